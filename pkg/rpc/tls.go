package rpc

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Roots returns the trust domain and its roots as they are now. It is asked at
// every handshake, so a changed bundle counts from the next one on.
type Roots func() (spiffeid.TrustDomain, *x509.CertPool)

// ServerTLS returns transport credentials for agents and remote operators:
// TLS 1.3 only, no resumption (a resumed session would outlive a removed
// root), a client certificate requested but not demanded. A certificate that
// is not an X.509-SVID of the trust domain ends the handshake; an expired one
// is recorded as such.
func ServerTLS(leaf func() (*tls.Certificate, error), roots Roots) credentials.TransportCredentials {
	return &tlsCreds{
		server: func() (*tls.Config, func(tls.ConnectionState) Caller) {
			var caller Caller
			cfg := baseTLS()
			cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return leaf() }
			cfg.ClientAuth = tls.RequestClientCert
			cfg.VerifyConnection = func(state tls.ConnectionState) error {
				var err error
				caller, err = verifyClient(state.PeerCertificates, roots)
				return err
			}
			return cfg, func(tls.ConnectionState) Caller { return caller }
		},
	}
}

// TokenTLS returns transport credentials for callers that prove who they are by a
// token in each call: TLS 1.2 or 1.3, no resumption, and no client certificate is
// asked for.
func TokenTLS(leaf func() (*tls.Certificate, error)) credentials.TransportCredentials {
	return &tlsCreds{
		server: func() (*tls.Config, func(tls.ConnectionState) Caller) {
			cfg := baseTLS()
			cfg.MinVersion = tls.VersionTLS12
			// Of TLS 1.2, forward secrecy and AEAD only.
			cfg.CipherSuites = []uint16{
				tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
				tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
			}
			cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return leaf() }
			return cfg, func(tls.ConnectionState) Caller { return Caller{State: CertNone} }
		},
	}
}

func verifyClient(chain []*x509.Certificate, roots Roots) (Caller, error) {
	if len(chain) == 0 {
		return Caller{State: CertNone}, nil
	}
	if err := checkCost(chain); err != nil {
		return Caller{}, err
	}
	td, pool := roots()
	id, root, err := verifyPeer(chain, pool, td, time.Now())
	state := CertValid
	if err != nil {
		if fault.ReasonOf(err) != "svid_expired" {
			return Caller{}, err
		}
		state = CertExpired
	}
	key := sha256.Sum256(chain[0].RawSubjectPublicKeyInfo)
	return Caller{
		ID: id, Serial: chain[0].SerialNumber.Text(16), KeyHash: hex.EncodeToString(key[:]),
		NotBefore: chain[0].NotBefore, NotAfter: lastMoment(chain), State: state,
		Authority: hex.EncodeToString(root.SubjectKeyId),
	}, nil
}

// maxClientRSA is in bits. The authorities of our own trust domain certify no
// larger keys.
const maxClientRSA = 4096

// checkCost bounds what it costs a server to verify a stranger's chain: its
// length, the size of its keys, and one possible issuer for each certificate,
// so that there is one signature each to verify.
func checkCost(chain []*x509.Certificate) error {
	if len(chain) > maxChain {
		return invalidSVID("the chain is too long", nil)
	}
	for i, c := range chain {
		if key, ok := c.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() > maxClientRSA {
			return invalidSVID("the chain has an RSA key of more than 4096 bits", nil)
		}
		if i > 0 && !bytes.Equal(chain[i-1].RawIssuer, c.RawSubject) {
			return invalidSVID("a certificate of the chain is not followed by its issuer", nil)
		}
		for _, before := range chain[1:max(i, 1)] {
			if bytes.Equal(before.RawSubject, c.RawSubject) {
				return invalidSVID("two issuers of the chain have the same name", nil)
			}
		}
	}
	return nil
}

// ClientTLS returns transport credentials that accept only a server whose
// X.509-SVID carries serverID and chains to one of roots, which is asked at
// every handshake. leaf returns the client's certificate, or nil for none.
func ClientTLS(serverID spiffeid.ID, roots func() []*x509.Certificate, leaf func() *tls.Certificate) credentials.TransportCredentials {
	return &tlsCreds{client: func() *tls.Config {
		cfg := baseTLS()
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if cert := leaf(); cert != nil {
				return cert, nil
			}
			return &tls.Certificate{}, nil
		}
		cfg.VerifyConnection = func(state tls.ConnectionState) error {
			pool := x509.NewCertPool()
			for _, c := range roots() {
				pool.AddCert(c)
			}
			id, err := VerifyPeer(state.PeerCertificates, pool, serverID.TrustDomain(), time.Now())
			if err != nil {
				return err
			}
			if id != serverID {
				return invalidSVID("the server presented another SPIFFE ID than "+serverID.String(), nil)
			}
			return nil
		}
		return cfg
	}}
}

// ClientTLSUnverified returns transport credentials that accept any server.
// They serve one purpose: to fetch the bundle from which a caller then trusts
// only what matches a pin. Nothing secret may be sent over them.
func ClientTLSUnverified() credentials.TransportCredentials {
	return &tlsCreds{client: baseTLS}
}

func baseTLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		SessionTicketsDisabled: true,
		// SPIFFE peers are verified by VerifyConnection, not by host name.
		InsecureSkipVerify: true, //nolint:gosec // G402: every user of this config sets VerifyConnection, except ClientTLSUnverified, which says why
	}
}

// tlsCreds makes a new tls.Config for each handshake: configs are never
// mutated, and no session state is shared between bundle generations.
type tlsCreds struct {
	server func() (*tls.Config, func(tls.ConnectionState) Caller)
	client func() *tls.Config
}

// ServerHandshake implements credentials.TransportCredentials.
func (c *tlsCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if c.server == nil {
		return nil, nil, errors.New("client credentials on a server")
	}
	cfg, caller := c.server()
	conn := tls.Server(raw, cfg)
	// The server's connection timeout has set a deadline on raw.
	if err := conn.HandshakeContext(context.Background()); err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	return finish(conn, caller(conn.ConnectionState()))
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *tlsCreds) ClientHandshake(ctx context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if c.client == nil {
		return nil, nil, errors.New("server credentials on a client")
	}
	conn := tls.Client(raw, c.client())
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	return finish(conn, Caller{})
}

func finish(conn *tls.Conn, caller Caller) (net.Conn, credentials.AuthInfo, error) {
	state := conn.ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		_ = conn.Close()
		return nil, nil, errors.New("peer did not negotiate h2")
	}
	return conn, &TLSInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		State:          state, caller: caller,
	}, nil
}

// Info implements credentials.TransportCredentials.
func (c *tlsCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (c *tlsCreds) Clone() credentials.TransportCredentials { clone := *c; return &clone }

// OverrideServerName implements credentials.TransportCredentials; SPIFFE peers
// have no server name.
func (c *tlsCreds) OverrideServerName(string) error { return nil }
