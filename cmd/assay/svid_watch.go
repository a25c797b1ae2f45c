package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
)

// watchLine is what `svid watch -o json` prints for each update, one line
// each. Dir is empty without --dir.
type watchLine struct {
	Time   time.Time   `json:"time"`
	Update int         `json:"update"`
	SVIDs  []svidShape `json:"svids"`
	Roots  int         `json:"roots"`
	Dir    string      `json:"dir"`
}

// watchFlags are the flags of `svid watch`.
type watchFlags struct {
	picker
	dir, exec   string
	execTimeout time.Duration
	count       int
}

func newSVIDWatchCommand(t *tool) *cobra.Command {
	var f watchFlags
	cmd := &cobra.Command{
		Use:   "watch",
		Short: "Follow the X.509-SVIDs of this process",
		Long: `Follow what the Workload API gives to this process and print a line per update,
until interrupted. When the agent goes away, the watch waits for it and says so
on standard error.

With --dir each update replaces svid.pem, svid_key.pem and bundle.pem together
(see svid fetch for their names), before its line is printed. Which identity is
the first changes when entries come or go: with several identities always name
one, with --id or --hint. When an entry's end takes the identity away, the files stay
as they are, and the reason is on standard error.

With --exec a command runs after each update, with the directory in
ASSAY_SVID_DIR; its output goes to standard error. It runs without a shell,
words may be quoted; for a shell write sh -c '...'. When it fails, that is
reported and the watch goes on.

  $ assay svid watch --dir /run/web/tls --exec 'systemctl reload nginx'
  $ assay svid watch --count 1 -o json | jq -r '.svids[0].spiffe_id'`,
		Args: noArgs,
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.check(cmd); err != nil {
			return err
		}
		if f.count < 0 {
			return usageError("--count can't be negative")
		}
		if f.execTimeout <= 0 {
			return usageError("--exec-timeout must be positive")
		}
		command, err := splitCommand(f.exec)
		if err != nil {
			return usageError("--exec: " + err.Error())
		}
		if cmd.Flags().Changed("exec") && len(command) == 0 {
			return usageError("--exec holds no command")
		}
		return t.watchSVID(cmd.Context(), f, command)
	}
	f.flags(cmd)
	cmd.Flags().StringVar(&f.dir, "dir", "", "directory to keep the files in; made if missing")
	cmd.Flags().StringVar(&f.exec, "exec", "", "command to run after each update")
	cmd.Flags().DurationVar(&f.execTimeout, "exec-timeout", time.Minute, "end the command after this time")
	cmd.Flags().IntVar(&f.count, "count", 0, "end after this many updates (default: never)")
	return t.endpointFlags(cmd)
}

// watcher handles updates one after the other, in the client's own goroutine:
// while a command runs, the next update waits in the connection.
type watcher struct {
	t       *tool
	end     context.CancelCauseFunc
	e       endpoint
	f       watchFlags
	out     *output // nil without --dir
	command []string
	updates int
	written bool // a set was written: the directory is known to work
	warned  string
	several bool // errSeveral was printed
}

func (t *tool) watchSVID(ctx context.Context, f watchFlags, command []string) error {
	e, err := t.endpoint()
	if err != nil {
		return err
	}
	client, err := e.dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	w := &watcher{t: t, end: end, e: e, f: f, command: command}
	if f.dir != "" {
		if w.out, err = openOutput(f.dir); err != nil {
			return err
		}
		defer w.out.close()
	}
	err = client.WatchX509Context(ctx, callbacks{
		update: func(c *workloadapi.X509Context) { w.update(ctx, c) },
		failed: func(err error) { w.failed(ctx, err) },
	})
	if ctx.Err() == nil { // the agent said something final
		return e.explain(ctx, err)
	}
	if ended, ok := errors.AsType[watchEnd](context.Cause(ctx)); ok {
		return ended.err
	}
	return nil // interrupted: that is how a watch ends
}

// watchEnd is the cause of a watch that ends by itself; err is nil for one
// that saw all it was asked for.
type watchEnd struct{ err error }

func (watchEnd) Error() string { return "the watch has ended" }

// callbacks is what go-spiffe wants to be given.
type callbacks struct {
	update func(*workloadapi.X509Context)
	failed func(error)
}

func (c callbacks) OnX509ContextUpdate(x *workloadapi.X509Context) { c.update(x) }

func (c callbacks) OnX509ContextWatchError(err error) { c.failed(err) }

// update handles one update.
func (w *watcher) update(ctx context.Context, c *workloadapi.X509Context) {
	if ctx.Err() != nil {
		return
	}
	w.warned = ""
	m, err := w.f.pick(c)
	if err != nil {
		w.warn(err)
		return
	}
	if err := w.store(ctx, m); err != nil {
		w.end(watchEnd{err})
		return
	}
	if ctx.Err() != nil {
		return
	}
	w.updates++
	if err := w.report(m); err != nil {
		w.end(watchEnd{err})
		return
	}
	w.run(ctx)
	if w.f.count > 0 && w.updates >= w.f.count {
		w.end(watchEnd{})
	}
}

// failed reports why there are no updates now. Unimplemented ends the watch,
// though go-spiffe would try again for ever: the standard says that a client
// should not (SPIFFE_Workload_Endpoint section 6).
func (w *watcher) failed(ctx context.Context, err error) {
	if ctx.Err() != nil || status.Code(err) == codes.InvalidArgument {
		return // watchSVID says it
	}
	explained := w.e.explain(ctx, err)
	if status.Code(err) == codes.Unimplemented {
		w.end(watchEnd{explained})
		return
	}
	w.warn(explained)
}

// warn prints a problem that does not end the watch, once while it lasts.
func (w *watcher) warn(err error) {
	shape := daemon.Describe(err)
	if shape.Reason == w.warned {
		return
	}
	w.warned = shape.Reason
	w.t.warn(err)
}

// store writes an update's files. A directory that never worked is a mistake
// of the command line and ends the watch; one that worked and then fails (its
// disk is full) is tried again until it works: the old set may still serve.
func (w *watcher) store(ctx context.Context, m material) error {
	if w.out == nil {
		return nil
	}
	if !w.several && w.f.positional(m) {
		w.several = true
		w.t.warn(errSeveral(m))
	}
	files, err := m.files()
	if err != nil {
		return err
	}
	retry := schedule.Backoff{Min: 200 * time.Millisecond, Max: 10 * time.Second}
	for {
		err := w.out.publish(files)
		if err == nil {
			w.written = true
			return nil
		}
		if !w.written {
			return err
		}
		w.warn(err)
		if schedule.Sleep(ctx, retry.Next()) != nil {
			return nil
		}
	}
}

// report prints the line of an update.
func (w *watcher) report(m material) error {
	now := time.Now().UTC()
	if w.t.format == formatText {
		return writeUpdate(w.t.stdout, now, w.updates, m)
	}
	line := watchLine{Time: now, Update: w.updates, SVIDs: []svidShape{}, Roots: len(m.bundle(m.svids[0].ID.TrustDomain()))}
	if w.out != nil {
		line.Dir = w.out.dir
	}
	for _, s := range m.svids {
		shape, err := svidFrom(s, false)
		if err != nil {
			return err
		}
		line.SVIDs = append(line.SVIDs, shape)
	}
	return w.t.printJSON(line)
}

func writeUpdate(out io.Writer, now time.Time, update int, m material) error {
	s := m.svids[0]
	leaf := s.Certificates[0]
	line := stamp(now) + " update=" + strconv.Itoa(update) + " id=" + s.ID.String() + " serial=" + serial(leaf) +
		" not_after=" + stamp(leaf.NotAfter) + " roots=" + strconv.Itoa(len(m.bundle(s.ID.TrustDomain())))
	if len(m.svids) > 1 {
		line += " identities=" + strconv.Itoa(len(m.svids))
	}
	if _, err := fmt.Fprintln(out, plain(line)); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// run runs the command, if there is one, and reports its failure.
func (w *watcher) run(ctx context.Context) {
	if len(w.command) == 0 {
		return
	}
	dir := ""
	if w.out != nil {
		dir = w.out.dir
	}
	err := runCommand(ctx, w.command, w.f.execTimeout, dir, w.t.stderr)
	if err != nil && ctx.Err() == nil {
		w.warned = "" // each run counts
		w.warn(fault.Wrap(fault.NotReady, err, "exec_failed", quote(w.command[0])+" failed"))
		w.warned = ""
	}
}
