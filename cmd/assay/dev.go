package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/agent"
	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	"github.com/seed-caa81108/assay/server"
)

// devShape is what `dev -o json` prints, on one line, once all is ready.
type devShape struct {
	TrustDomain    string `json:"trust_domain"`
	AgentID        string `json:"agent_id"`
	ServerSocket   string `json:"server_socket"`
	EndpointSocket string `json:"endpoint_socket"`
	SDSSocket      string `json:"sds_socket"`
	Dir            string `json:"dir"`
}

// devFlags are the flags of `dev`.
type devFlags struct {
	dir, trustDomain string
	ttl              time.Duration
}

func newDevCommand(t *tool) *cobra.Command {
	var f devFlags
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a server and an agent in this process, to try things out",
		Long: `Run a whole trust domain in one process, without root: a server with an embedded
store and one agent that has joined it. When both are ready, it prints what to
export and how to make a first entry. Started again with the same directory it
goes on where it stopped. It is for development: the root's key and the key
that seals it lie in the same directory.

  $ assay dev
  $ assay dev --dir /tmp/try --trust-domain example.org --x509-svid-ttl 1m`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return t.runDev(cmd.Context(), f) },
	}
	cmd.Flags().StringVar(&f.dir, "dir", "",
		"directory for all state (default $XDG_RUNTIME_DIR/assay-dev, else ~/.local/state/assay-dev)")
	cmd.Flags().StringVar(&f.trustDomain, "trust-domain", "example.org", "name of the trust domain")
	cmd.Flags().DurationVar(&f.ttl, "x509-svid-ttl", time.Hour, "lifetime of the X.509-SVIDs")
	return cmd
}

// dev is one running pair of server and agent.
type dev struct {
	t     *tool
	f     devFlags
	dir   string
	token string // file with the join token
	log   *slog.Logger
	build daemon.Build
}

func (t *tool) runDev(ctx context.Context, f devFlags) error {
	if _, err := spiffeid.TrustDomainFromString(f.trustDomain); err != nil {
		return usageError("--trust-domain must be a name as example.org, got " + quote(f.trustDomain))
	}
	if f.ttl <= 0 {
		return usageError("--x509-svid-ttl must be positive")
	}
	dir, err := devDir(f.dir, t.getenv)
	if err != nil {
		return err
	}
	if err := durable.MkdirPrivate(dir, 0o700); err != nil {
		return err
	}
	log, err := daemon.NewLogger(t.stderr, "warn", "text")
	if err != nil {
		return err
	}
	d := &dev{t: t, f: f, dir: dir, token: filepath.Join(dir, "join_token"), log: log, build: daemon.ReadBuild()}
	return d.run(ctx)
}

// devDir is where everything is: the runtime directory goes with the login
// session, which suits a trust domain that is for trying.
func devDir(flag string, getenv func(string) string) (string, error) {
	dir := flag
	switch {
	case dir != "":
	case getenv("XDG_RUNTIME_DIR") != "":
		dir = filepath.Join(getenv("XDG_RUNTIME_DIR"), "assay-dev")
	case getenv("XDG_STATE_HOME") != "":
		dir = filepath.Join(getenv("XDG_STATE_HOME"), "assay-dev")
	case getenv("HOME") != "":
		dir = filepath.Join(getenv("HOME"), ".local", "state", "assay-dev")
	default:
		return "", usageError("neither XDG_RUNTIME_DIR nor HOME is set: name a directory with --dir")
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("find directory: %w", err)
	}
	return abs, nil
}

// run runs the server and, on top of it, the agent; the agent stops first.
func (d *dev) run(ctx context.Context) error {
	srv, err := d.newServer()
	if err != nil {
		return err
	}
	group, inner := errgroup.WithContext(ctx)
	below, stopServer := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServer()
	group.Go(func() error {
		err := srv.Run(below)
		return devEnded("server", err, below.Err() != nil, isClosed(srv.Started()))
	})
	group.Go(func() error {
		defer stopServer()
		select {
		case <-srv.Started():
			return d.runAgent(inner, srv)
		case <-inner.Done():
			return nil
		}
	})
	return group.Wait()
}

// devEnded judges how a daemon ended. One that is told to stop while it starts
// may say that it was interrupted, which is no error here.
func devEnded(name string, err error, stopped, served bool) error {
	switch {
	case stopped && !served:
		return nil
	case err != nil:
		return err
	case !stopped:
		return fmt.Errorf("run %s: it ended by itself", name)
	}
	return nil
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (d *dev) newServer() (*server.Server, error) {
	seal := filepath.Join(d.dir, "seal.key")
	if _, err := os.Lstat(seal); errors.Is(err, fs.ErrNotExist) {
		if err := server.WriteSealKey(seal); err != nil {
			return nil, err
		}
	}
	cfg := server.Config{
		TrustDomain: d.f.trustDomain,
		// An empty store is a new trust domain here: that is what dev is for.
		Bootstrap:   time.Now().UTC().Format(time.DateOnly),
		SealKeyFile: seal,
		Listen:      "127.0.0.1:0",
		Admin:       server.AdminConfig{Socket: filepath.Join(d.dir, "admin.sock")},
		DataDir:     filepath.Join(d.dir, "server"),
	}
	cfg.CA.X509SVIDTTL = d.f.ttl
	cfg.CA.MaxX509SVIDTTL = max(d.f.ttl, time.Hour)
	return server.New(cfg, server.Deps{
		Log: d.log.With(slog.String("part", "server")), Registerer: prometheus.NewRegistry(), Version: d.build.Version,
	})
}

// runAgent joins an agent and runs it until ctx ends.
func (d *dev) runAgent(ctx context.Context, srv *server.Server) error {
	s, err := (&tool{env: d.t.env, socket: srv.AdminSocket()}).dialServer(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	ag, sockets, err := d.newAgent(ctx, s, srv.Addr().String())
	if err != nil {
		if ctx.Err() != nil {
			return nil // stopped while it was starting
		}
		return err
	}
	group, inner := errgroup.WithContext(ctx)
	group.Go(func() error {
		err := ag.Run(inner)
		return devEnded("agent", err, inner.Err() != nil, ag.Ready(inner) == nil)
	})
	group.Go(func() error {
		id, err := joined(inner, s, ag)
		if err != nil {
			if inner.Err() != nil {
				return nil // stopped, or the agent's own error says more
			}
			return err
		}
		shape := devShape{
			TrustDomain: d.f.trustDomain, AgentID: id, ServerSocket: srv.AdminSocket(), EndpointSocket: "unix://" + filepath.Join(sockets, "api.sock"),
			SDSSocket: filepath.Join(sockets, "sds.sock"), Dir: d.dir,
		}
		return d.t.print(shape, shape.write)
	})
	return group.Wait()
}

// newAgent prepares the agent. Each start gets a token: an agent that still has
// its identity does not look at it, one that lost it joins anew.
func (d *dev) newAgent(ctx context.Context, s *serverConn, address string) (ag *agent.Agent, sockets string, err error) {
	token, err := createToken(ctx, s, 10*time.Minute, "")
	if err != nil {
		return nil, "", err
	}
	if err := durable.WriteFile(d.token, []byte(token.Token+"\n"), 0o600); err != nil {
		return nil, "", err
	}
	cfg := agent.Config{
		TrustDomain:   d.f.trustDomain,
		Server:        agent.ServerConfig{Addresses: []string{address}},
		Pin:           token.Pin,
		JoinTokenFile: d.token,
		Sockets:       agent.SocketsConfig{Dir: filepath.Join(d.dir, "public")},
		DataDir:       filepath.Join(d.dir, "agent"),
		RunDir:        filepath.Join(d.dir, "run"),
	}
	ag, err = agent.New(cfg, agent.Deps{
		Log: d.log.With(slog.String("part", "agent")), Registerer: prometheus.NewRegistry(), Version: d.build.Version,
	})
	return ag, cfg.Sockets.Dir, err
}

// joined waits until the agent serves and the server sees it, and returns its
// SPIFFE ID: an agent that was here before has kept its own.
func joined(ctx context.Context, s *serverConn, ag *agent.Agent) (string, error) {
	pause := schedule.Backoff{Min: 10 * time.Millisecond, Max: 200 * time.Millisecond}
	for {
		if ag.Ready(ctx) == nil {
			status, err := ask(ctx, s, s.admin.Status, &adminv1.StatusRequest{})
			if err != nil {
				return "", err
			}
			for _, a := range status.GetAgents() {
				if a.GetConnected() {
					return a.GetId(), nil
				}
			}
		}
		if schedule.Sleep(ctx, pause.Next()) != nil {
			return "", fault.New(fault.NotReady, "interrupted", "interrupted before the agent was ready")
		}
	}
}

func (s devShape) write(w io.Writer) error {
	_, err := fmt.Fprintf(w, `Server and agent of trust domain %s are ready. Stop them with Ctrl-C.
State is in %s

export ASSAY_SERVER_SOCKET=%s
export SPIFFE_ENDPOINT_SOCKET=%s

Give your processes an identity, and fetch it:

assay entry create --spiffe-id spiffe://%s/hello \
  --parent-id %s \
  --selector unix:uid:%s
assay svid fetch

Envoy finds the same by SDS at %s
`, s.TrustDomain, s.Dir, s.ServerSocket, s.EndpointSocket, s.TrustDomain, s.AgentID, strconv.Itoa(os.Getuid()), s.SDSSocket)
	if err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}
