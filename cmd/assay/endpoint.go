package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
)

const (
	defaultEndpoint = "unix:///run/assay/public/api.sock"
	endpointEnv     = workloadapi.SocketEnv
)

// endpointFlags adds what every verb that talks to the Workload API takes.
func (t *tool) endpointFlags(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&t.socket, "socket", "",
		"the Workload API as a URI (default $"+endpointEnv+", else "+defaultEndpoint+")")
	return cmd
}

// endpoint is where a Workload API is served.
type endpoint struct {
	uri              string
	network, address string // as net.Dial takes them
}

// endpoint finds the Workload API: explicit configuration first, then the
// environment (SPIFFE_Workload_Endpoint section 4), then the agent's default.
func (t *tool) endpoint() (endpoint, error) { return t.endpointAt("--socket", t.socket) }

// endpointAt is endpoint with what the flag from says, which may be nothing.
func (t *tool) endpointAt(from, uri string) (endpoint, error) {
	if uri == "" {
		from, uri = endpointEnv, t.getenv(endpointEnv)
	}
	if uri == "" {
		uri = defaultEndpoint
	}
	e, err := parseEndpoint(uri)
	if err != nil {
		return endpoint{}, usageError(from + " " + quote(uri) + ": " + err.Error())
	}
	return e, nil
}

// parseEndpoint accepts unix with an absolute path and nothing else, and tcp
// with an IP address and a port and nothing else. go-spiffe also takes a unix
// URI with a host and then can't dial it: here it is refused with a reason.
func parseEndpoint(uri string) (endpoint, error) {
	if strings.HasPrefix(uri, "/") {
		return endpoint{}, fmt.Errorf("is a path, the standard wants a URI: unix://%s", uri)
	}
	if err := workloadapi.ValidateAddress(uri); err != nil {
		return endpoint{}, err
	}
	u, err := url.Parse(uri)
	if err != nil {
		return endpoint{}, err
	}
	if u.Scheme == "tcp" {
		return endpoint{uri: uri, network: "tcp", address: u.Host}, nil
	}
	if u.Host != "" || !strings.HasPrefix(u.Path, "/") || strings.ContainsRune(u.Path, 0) {
		return endpoint{}, fmt.Errorf("a unix URI has an absolute path and no host, as in %s", defaultEndpoint)
	}
	return endpoint{uri: uri, network: "unix", address: u.Path}, nil
}

// dial returns a Workload API client that comes back quickly after the agent
// was away: gRPC's own pauses between connections grow to two minutes.
func (e endpoint) dial(ctx context.Context) (*workloadapi.Client, error) {
	reconnect := backoff.DefaultConfig
	reconnect.BaseDelay, reconnect.MaxDelay = 100*time.Millisecond, 2*time.Second
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(e.uri),
		workloadapi.WithDialOptions(grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnect, MinConnectTimeout: 5 * time.Second})),
		workloadapi.WithBackoffStrategy(retries{}))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", e.uri, err)
	}
	return client, nil
}

// explain says why a Workload API call failed. What did not come from gRPC is
// an answer that breaks the standard.
func (e endpoint) explain(ctx context.Context, err error) error {
	if _, ok := status.FromError(err); !ok {
		return fault.Wrap(fault.Invalid, err, "bad_answer", "the Workload API's answer is unusable")
	}
	return withIDs(callError(ctx, err, peer{name: "the Workload API", network: e.network, address: e.address, open: true}))
}

// withIDs tells a process without an identity what an entry would have to name.
func withIDs(err error) error {
	if fault.ReasonOf(err) != "no_identity" {
		return err
	}
	return reword(err, fmt.Sprintf("%s: no entry for this node fits this process, uid %d and gid %d; compare with `assay entry list` on the server",
		fault.SafeText(err), os.Geteuid(), os.Getegid()))
}

// reword gives the fault of a peer another text; its kind, its reason and the
// id under which the peer has logged it stay.
func reword(err error, text string) error {
	return fault.FromStatus(fault.Status(fault.New(fault.KindOf(err), fault.ReasonOf(err), text), fault.RequestIDOf(err)).Err())
}

// retries makes watches retry with jitter and within 10 s: go-spiffe's own
// steps have none, so that all clients of a restarted agent come back at once.
type retries struct{}

func (retries) NewBackoff() workloadapi.Backoff {
	return &schedule.Backoff{Min: 200 * time.Millisecond, Max: 10 * time.Second}
}
