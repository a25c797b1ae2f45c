package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
)

// fetchShape is what `svid fetch -o json` and `x509 mint -o json` print. Dir and
// Files are where it was written to; without --dir or --write they are empty.
type fetchShape struct {
	SVIDs   []svidShape  `json:"svids"`
	Bundles []trustShape `json:"bundles"`
	Dir     string       `json:"dir"`
	Files   []string     `json:"files"`
}

// fetchFlags are the flags of `svid fetch`.
type fetchFlags struct {
	picker
	dir     string
	timeout time.Duration
	withKey bool
}

func newSVIDFetchCommand(t *tool) *cobra.Command {
	var f fetchFlags
	cmd := &cobra.Command{
		Use:   "fetch",
		Short: "Fetch the X.509-SVIDs of this process",
		Long: `Fetch what the Workload API gives to this process and show it. While the agent
can't be reached or is not ready, it is asked again until the timeout; a
refusal is final.

With --dir the certificate chain, key and roots are written to svid.pem,
svid_key.pem (mode 0600) and bundle.pem; further identities to svid.1.pem and
so on, roots of other trust domains to bundle.<trust domain>.pem. All names
change at the same instant. Which identity is the first changes when entries
come or go: with several identities always name one, with --id or --hint.
Private keys are not printed unless --with-key and -o json ask for it.

  $ assay svid fetch
  $ assay svid fetch --dir /run/web/tls --id spiffe://example.org/web`,
		Args: noArgs,
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.check(cmd); err != nil {
			return err
		}
		if f.timeout <= 0 {
			return usageError("--timeout must be positive")
		}
		if f.withKey && t.format != formatJSON {
			return usageError("--with-key needs -o json; --dir writes keys to files")
		}
		return t.fetchSVID(cmd.Context(), f)
	}
	f.flags(cmd)
	cmd.Flags().StringVar(&f.dir, "dir", "", "directory to write the files to; made if missing")
	cmd.Flags().DurationVar(&f.timeout, "timeout", 10*time.Second, "how long to wait for an answer")
	cmd.Flags().BoolVar(&f.withKey, "with-key", false, "put private keys into the JSON output")
	return t.endpointFlags(cmd)
}

func (t *tool) fetchSVID(ctx context.Context, f fetchFlags) error {
	e, err := t.endpoint()
	if err != nil {
		return err
	}
	answer, err := t.fetch(ctx, e, f.timeout)
	if err != nil {
		return err
	}
	m, err := f.pick(answer)
	if err != nil {
		return err
	}
	var files []string
	dir := ""
	if f.dir != "" {
		if f.positional(m) {
			t.warn(errSeveral(m))
		}
		if dir, files, err = save(f.dir, m); err != nil {
			return err
		}
	}
	return t.show(m, f.withKey, dir, files)
}

// show prints m, and to which files of dir it was written.
func (t *tool) show(m material, withKey bool, dir string, files []string) error {
	doc := fetchShape{SVIDs: []svidShape{}, Bundles: []trustShape{}, Dir: dir, Files: list(files)}
	for _, s := range m.svids {
		shape, err := svidFrom(s, withKey)
		if err != nil {
			return err
		}
		doc.SVIDs = append(doc.SVIDs, shape)
	}
	for _, b := range m.bundles {
		doc.Bundles = append(doc.Bundles, trustFrom(b))
	}
	return t.print(doc, func(w io.Writer) error {
		if err := m.write(w, time.Now()); err != nil {
			return err
		}
		for _, path := range doc.Files {
			if _, err := fmt.Fprintln(w, "wrote", plain(path)); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
		}
		return nil
	})
}

// save writes m to dir, once.
func save(dir string, m material) (abs string, paths []string, err error) {
	out, err := openOutput(dir)
	if err != nil {
		return "", nil, err
	}
	defer out.close()
	paths, err = out.save(m)
	return out.dir, paths, err
}

// save writes m and returns the paths of its files.
func (o *output) save(m material) ([]string, error) {
	files, err := m.files()
	if err != nil {
		return nil, err
	}
	if err := o.publish(files); err != nil {
		return nil, err
	}
	paths := make([]string, len(files))
	for i, f := range files {
		paths[i] = filepath.Join(o.dir, f.name)
	}
	return paths, nil
}

// fetch asks until there is an answer, a refusal or the timeout. Unavailable
// and unreachable are worth a retry, InvalidArgument and Unimplemented are not
// (SPIFFE_Workload_Endpoint section 6). PermissionDenied could be retried; the
// agent has already held the call while an identity might have come.
func (t *tool) fetch(ctx context.Context, e endpoint, timeout time.Duration) (*workloadapi.X509Context, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	client, err := e.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = client.Close() }()
	retry := schedule.Backoff{Min: 50 * time.Millisecond, Max: time.Second}
	var last error
	for {
		answer, err := client.FetchX509Context(ctx)
		if err == nil {
			return answer, nil
		}
		if last == nil || status.Code(err) != codes.DeadlineExceeded {
			explained := e.explain(ctx, err)
			if last == nil && t.isTTY && status.Code(err) == codes.Unavailable {
				_, _ = fmt.Fprintln(t.stderr, "waiting: "+oneLine(fault.SafeText(explained)))
			}
			last = explained
		}
		if status.Code(err) != codes.Unavailable || schedule.Sleep(ctx, retry.Next()) != nil {
			return nil, last
		}
	}
}
