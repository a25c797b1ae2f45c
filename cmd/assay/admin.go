package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	spirebundle "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	spiresvid "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

const (
	defaultServerSocket = "/run/assay-server/admin.sock"
	serverSocketEnv     = "ASSAY_SERVER_SOCKET"

	// callTimeout bounds one RPC to the server. Reads come from its memory and
	// writes are one commit: what takes longer is stuck.
	callTimeout = 30 * time.Second
	// maxAnswer is larger than gRPC's default: Status names every agent.
	maxAnswer = 64 << 20
)

// serverFlags adds what every verb that talks to the server takes.
func (t *tool) serverFlags(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&t.socket, "socket", "",
		"the server's admin socket (default $"+serverSocketEnv+", else "+defaultServerSocket+")")
	t.remote.flags(cmd)
	return cmd
}

// localFlags is serverFlags for verbs that no remote operator may use: the
// remote flags are there to be refused with a reason (localVerb).
func (t *tool) localFlags(cmd *cobra.Command) *cobra.Command {
	t.serverFlags(cmd)
	for _, name := range []string{"server", "identity", "as", "server-id"} {
		_ = cmd.Flags().MarkHidden(name) // they exist
	}
	return cmd
}

// serverConn is a connection to the server: to its admin socket, or to its
// port for agents as a remote operator.
type serverConn struct {
	conn     *grpc.ClientConn
	peer     peer
	admin    adminv1.AdminClient
	entries  spireentry.EntryClient
	agents   spireagent.AgentClient
	bundles  spirebundle.BundleClient
	svids    spiresvid.SVIDClient
	rotation adminv1.RotationClient
	// revision is the newest one of the store that answers told: what they
	// speak of is in it, and `assay wait` takes it. Zero for none.
	revision atomic.Int64
}

// dialServer prepares a connection; nothing is sent before the first call.
func (t *tool) dialServer(ctx context.Context) (*serverConn, error) {
	address, err := t.remoteServer()
	if err != nil {
		return nil, err
	}
	if address != "" {
		return t.dialRemote(ctx, address)
	}
	path, err := serverSocket(t.socket, t.getenv(serverSocketEnv))
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///assay-server",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the kernel tells each side who the other is
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
	)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", path, err)
	}
	return newServerConn(conn, peer{name: "the server's admin socket", network: "unix", address: path}), nil
}

func newServerConn(conn *grpc.ClientConn, p peer) *serverConn {
	return &serverConn{
		conn: conn, peer: p,
		admin:    adminv1.NewAdminClient(conn),
		entries:  spireentry.NewEntryClient(conn),
		agents:   spireagent.NewAgentClient(conn),
		bundles:  spirebundle.NewBundleClient(conn),
		svids:    spiresvid.NewSVIDClient(conn),
		rotation: adminv1.NewRotationClient(conn),
	}
}

func (s *serverConn) close() { _ = s.conn.Close() }

// serverSocket returns the path of the admin socket: the flag, else the
// environment, else the default; with or without a unix: scheme.
func serverSocket(flag, env string) (string, error) {
	from, path := "--socket", flag
	if path == "" {
		from, path = serverSocketEnv, env
	}
	if path == "" {
		return defaultServerSocket, nil
	}
	if rest, ok := strings.CutPrefix(path, "unix:"); ok {
		path = rest
		if strings.HasPrefix(rest, "//") {
			path = rest[2:]
		}
	}
	if !strings.HasPrefix(path, "/") || strings.ContainsRune(path, 0) {
		return "", usageError(from + " must be the absolute path of a Unix socket, as in " + defaultServerSocket)
	}
	return path, nil
}

// serverVerb makes RunE of a verb that talks to the server.
func (t *tool) serverVerb(do func(ctx context.Context, s *serverConn, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		s, err := t.dialServer(cmd.Context())
		if err != nil {
			return err
		}
		defer s.close()
		return do(cmd.Context(), s, args)
	}
}

// localVerb is serverVerb for what no remote operator may do.
func (t *tool) localVerb(do func(ctx context.Context, s *serverConn, args []string) error) func(*cobra.Command, []string) error {
	verb := t.serverVerb(do)
	return func(cmd *cobra.Command, args []string) error {
		if err := t.localOnly(cmd); err != nil {
			return err
		}
		return verb(cmd, args)
	}
}

// ask makes one call to the server under a deadline and explains its error.
func ask[Req, Resp any](ctx context.Context, s *serverConn, call func(context.Context, Req, ...grpc.CallOption) (Resp, error), req Req) (Resp, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var trailer metadata.MD
	resp, err := call(ctx, req, grpc.Trailer(&trailer))
	if err != nil {
		return resp, callError(ctx, err, s.peer)
	}
	s.note(trailer)
	return resp, nil
}

// note keeps the revision that an answer told.
func (s *serverConn) note(trailer metadata.MD) {
	for _, text := range trailer.Get(adminv1.RevisionMetadata) {
		told, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			continue // another program's
		}
		for have := s.revision.Load(); told > have && !s.revision.CompareAndSwap(have, told); have = s.revision.Load() {
		}
	}
}

// callError turns what a call returned into a fault that says what to do: the
// peer's own words if it answered, else why it can't be reached.
func callError(ctx context.Context, err error, p peer) error {
	st, _ := status.FromError(err)
	if answered(st) {
		return p.named(fault.FromStatus(err))
	}
	if distrust := p.distrust(); distrust != nil && ctx.Err() == nil {
		return distrust
	}
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return fault.New(fault.NotReady, "interrupted", "interrupted before an answer came")
	case st.Code() == codes.DeadlineExceeded && p.reachable() == nil:
		return fault.New(fault.NotReady, "timeout", "no answer from "+p.String()+" in time: see its log, or allow more time")
	case st.Code() == codes.Unavailable || st.Code() == codes.DeadlineExceeded:
		return p.unreachable()
	}
	return fault.FromStatus(err)
}

// answered says whether a status was made by an Assay daemon.
func answered(st *status.Status) bool {
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == fault.Domain {
			return true
		}
	}
	return false
}
