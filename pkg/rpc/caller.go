package rpc

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// CertState says what the caller's certificate is worth at the moment of the
// handshake. A bad certificate does not appear here: it ends the handshake.
type CertState int

// The states of a client certificate.
const (
	CertNone    CertState = iota // none was presented
	CertValid                    // an X.509-SVID of our trust domain
	CertExpired                  // was one; its time, or its issuer's, is over
)

// Caller is who is at the other end of a connection, established by the
// transport and not by anything that the caller says.
type Caller struct {
	// Local is true for a Unix socket: then UID and GID are the peer's as the
	// kernel recorded them at connect, and PID is a hint only.
	Local    bool
	UID, GID uint32
	PID      int32

	// ID, Serial (lower-case hex), KeyHash (SHA-256 of the SubjectPublicKeyInfo,
	// hex), NotBefore and NotAfter come from the verified certificate; they are
	// zero when State is CertNone.
	ID                  spiffeid.ID
	Serial              string
	KeyHash             string
	NotBefore, NotAfter time.Time
	State               CertState
	// Authority is the root that the certificate chains to: the lower-case hex
	// of its subject key id.
	Authority string
	// Operator says that the listener took the certificate for a remote
	// operator's. It is a word for logs: rules look at ID.
	Operator bool

	// Addr is the remote address, or "unix".
	Addr string
	// RequestID of the RPC that this is the caller of.
	RequestID string
}

// call is what the tap handle finds out about one RPC.
type call struct {
	caller Caller
	id     string
	method string

	cancel  context.CancelCauseFunc    // ends the call
	late    atomic.Pointer[time.Timer] // until its first message comes
	handled bool                       // an interceptor had it
}

type callKey struct{}

func withCall(ctx context.Context) (context.Context, *call) {
	c := &call{caller: callerOf(ctx), id: rand.Text()}
	c.caller.RequestID = c.id
	return context.WithValue(ctx, callKey{}, c), c
}

// CallerFrom returns the caller of the RPC that ctx belongs to.
func CallerFrom(ctx context.Context) Caller {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c.caller
	}
	return callerOf(ctx)
}

// RequestID returns the id of the RPC that ctx belongs to. It appears in the
// log, in the audit line and in the error that the caller sees.
func RequestID(ctx context.Context) string {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c.id
	}
	return ""
}

func callerOf(ctx context.Context) Caller {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Caller{}
	}
	var c Caller
	if info, ok := p.AuthInfo.(interface{ Caller() Caller }); ok {
		c = info.Caller()
	}
	if c.Addr == "" && p.Addr != nil {
		if c.Addr = p.Addr.String(); c.Local {
			c.Addr = "unix"
		}
	}
	return c
}

// TLSInfo is the AuthInfo of a connection made with ServerTLS or ClientTLS.
type TLSInfo struct {
	credentials.CommonAuthInfo
	State  tls.ConnectionState
	caller Caller
}

// AuthType implements credentials.AuthInfo.
func (*TLSInfo) AuthType() string { return "tls" }

// Caller returns the peer as its certificate shows it.
func (i *TLSInfo) Caller() Caller { return i.caller }

// ConnectionState returns the TLS state of the connection that ctx's RPC came
// over, for channel binding.
func ConnectionState(ctx context.Context) (tls.ConnectionState, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return tls.ConnectionState{}, false
	}
	return PeerConnectionState(p)
}

// PeerConnectionState is ConnectionState for a client, which learns the peer
// through grpc.Peer.
func PeerConnectionState(p *peer.Peer) (tls.ConnectionState, bool) {
	info, ok := p.AuthInfo.(*TLSInfo)
	if !ok {
		return tls.ConnectionState{}, false
	}
	return info.State, true
}
