package main

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
)

const (
	serverEnv   = "ASSAY_SERVER"
	identityEnv = "ASSAY_IDENTITY"
	serverIDEnv = "ASSAY_SERVER_ID"
	serverPort  = "8443"
)

// remoteFlags say which server over the network is meant, and who asks it.
type remoteFlags struct {
	server, identity, as, serverID string
}

func (r *remoteFlags) flags(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&r.server, "server", "", "HOST:PORT of a server on another host (default $"+serverEnv+")")
	fl.StringVar(&r.identity, "identity", "",
		"with --server, where your X.509-SVID is: a Workload API as a URI, or a directory of assay svid watch (default $"+identityEnv+", else the Workload API of this host)")
	fl.StringVar(&r.as, "as", "", "with --server, which SPIFFE ID to use, if you have several")
	fl.StringVar(&r.serverID, "server-id", "",
		"with --server, the SPIFFE ID that it must prove (default $"+serverIDEnv+", else spiffe://TRUST-DOMAIN/assay/server)")
}

// remoteServer returns the address of the server if it is one over the
// network. Flags go before the environment; whoever names two servers is asked
// which.
func (t *tool) remoteServer() (string, error) {
	from, text := "--server", t.remote.server
	if text == "" && t.socket == "" {
		from, text = serverEnv, t.getenv(serverEnv)
		if text != "" && t.getenv(serverSocketEnv) != "" {
			return "", usageError(serverEnv + " and " + serverSocketEnv + " name two servers: unset one, or say --server or --socket")
		}
	}
	switch {
	case t.remote.server != "" && t.socket != "":
		return "", usageError("--server and --socket name two servers: leave one out")
	case text == "" && t.remote != remoteFlags{}:
		return "", usageError("--identity, --as and --server-id need --server HOST:PORT")
	case text == "":
		return "", nil
	}
	address, ok := hostPort(text)
	if !ok {
		return "", usageError(from + " must be a host with a port, as in ca.example.org:" + serverPort + ", got " + quote(text))
	}
	return address, nil
}

// hostPort reads a host with a port, or with the usual one.
func hostPort(text string) (string, bool) {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		host, port = strings.TrimSuffix(strings.TrimPrefix(text, "["), "]"), serverPort
		if strings.Contains(host, ":") && net.ParseIP(host) == nil {
			return "", false
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || host == "" || strings.ContainsAny(host, "/@[] \t\r\n\x00") {
		return "", false
	}
	return net.JoinHostPort(host, port), true
}

// localOnly refuses a server over the network to a verb that no remote
// operator may use. To do it on this host instead is not what was meant.
func (t *tool) localOnly(cmd *cobra.Command) error {
	address, err := t.remoteServer()
	if err != nil || address == "" {
		return err
	}
	return fault.New(fault.Denied, "local_only",
		cmd.CommandPath()+" is for the server's host, through its admin socket: run it there, or name that with --socket")
}

// dialRemote prepares a connection to a server over the network, which has to
// prove that it is the server of our own trust domain.
func (t *tool) dialRemote(ctx context.Context, address string) (*serverConn, error) {
	me, err := t.operator(ctx)
	if err != nil {
		return nil, err
	}
	serverID, err := t.serverID(me.id.TrustDomain())
	if err != nil {
		return nil, err
	}
	failed := &atomic.Pointer[error]{}
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(proving{rpc.ClientTLS(serverID, me.roots, me.leaf), failed}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
	)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", address, err)
	}
	return newServerConn(conn, peer{name: "the server", network: "tcp", address: address, as: me.id, is: serverID, failed: failed}), nil
}

// serverID is the ID that the server must prove, exactly.
func (t *tool) serverID(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	from, text := "--server-id", t.remote.serverID
	if text == "" {
		from, text = serverIDEnv, t.getenv(serverIDEnv)
	}
	if text == "" {
		text = "spiffe://" + td.Name() + "/assay/server"
	}
	id, err := parseID(from, text)
	if err == nil && id.TrustDomain() != td {
		err = usageError(from + " must be in your own trust domain, " + td.Name())
	}
	return id, err
}

// proving are credentials that keep their verdict on the server: gRPC itself
// only has a text for that.
type proving struct {
	credentials.TransportCredentials
	failed *atomic.Pointer[error]
}

// ClientHandshake implements credentials.TransportCredentials.
func (p proving) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := p.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		p.failed.Store(&err)
		return nil, nil, err
	}
	p.failed.Store(nil)
	return conn, info, nil
}

// Clone implements credentials.TransportCredentials.
func (p proving) Clone() credentials.TransportCredentials {
	return proving{p.TransportCredentials.Clone(), p.failed}
}

// distrust says why the TLS handshake with a remote server failed; nothing if
// it did not.
func (p peer) distrust() error {
	if p.failed == nil || p.failed.Load() == nil {
		return nil
	}
	err := *p.failed.Load()
	if fault.KindOf(err) != fault.Unauthenticated { // it never came to a verdict
		return fault.Wrap(fault.NotReady, err, "server_unreachable",
			"what answers at "+p.address+" does not finish the TLS handshake: is it the server's port for agents and operators")
	}
	return fault.Wrap(fault.Unauthenticated, err, "server_untrusted",
		"what answers at "+p.address+" is not "+p.is.String()+", so nothing was asked: "+fault.SafeText(err)+"; check --server, --server-id and the roots of your identity")
}
