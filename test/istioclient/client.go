// Package istioclient asks for certificates as the programs of Istio do:
// istio-agent for a sidecar, and ztunnel. It is written against Istio's published
// API and sends what they send: TLS settings, headers, metadata, requests, and
// which errors they repeat. It judges the answers as strictly as the strictest of
// them. It is a stand-in: neither program is to be had for tests.
package istioclient

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	istiov1 "istio.io/api/security/v1alpha1"
)

// Client is one proxy's. Its fields are what its environment tells it.
type Client struct {
	Address    string                 // CA_ADDR: host:port
	ServerName string                 // empty: the host of Address
	Roots      func() []byte          // the root file, read at each connection
	Token      func() (string, error) // the token file, read at each call; nil: it is missing
	ClusterID  string
	Identity   string // spiffe://td/ns/x/sa/y, which the request names
	NewKey     func() (crypto.Signer, error)
	// ZTunnel is to ask as ztunnel does; Impersonate is for whom.
	ZTunnel     bool
	Impersonate string
	// Names is what the request names instead of whom it is for.
	Names string
	// Validity is asked for, in seconds; zero: a day.
	Validity int64

	conn *grpc.ClientConn
	// Calls counts what went over the wire.
	Calls int
}

// Answer is a certificate as its proxy would use it.
type Answer struct {
	Key   crypto.Signer
	Chain []string // as it came
	Leaf  *x509.Certificate
	Roots []*x509.Certificate
}

// RSA and P256 make keys as istio-agent does by default, and ztunnel.
func RSA() (crypto.Signer, error)  { return rsa.GenerateKey(rand.Reader, 2048) }
func P256() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// Fetch asks for a certificate, again if the error is one that may pass: five
// times in all within a second and a half, as both do.
func (c *Client) Fetch(ctx context.Context) (*Answer, error) {
	pause := 100 * time.Millisecond
	for attempt := 1; ; attempt++ {
		answer, err := c.Once(ctx)
		if err == nil {
			return answer, nil
		}
		c.Close() // the next connection reads the root file anew
		if attempt == 5 || !repeated(err) {
			return nil, err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, err
		}
		pause *= 2
	}
}

// repeated is what Istio's interceptor tries again. Codes of contexts are on its
// list, but what is below it stops at them.
func repeated(err error) bool {
	return slices.Contains([]codes.Code{codes.Unavailable, codes.ResourceExhausted, codes.Aborted, codes.Internal}, status.Code(err))
}

// Once asks once.
func (c *Client) Once(ctx context.Context) (*Answer, error) {
	key, err := c.newKey()
	if err != nil {
		return nil, err
	}
	csr, err := c.csr(key)
	if err != nil {
		return nil, err
	}
	resp, err := c.Send(ctx, csr, c.metadata())
	if err != nil {
		return nil, err
	}
	return c.judge(key, resp.GetCertChain())
}

func (c *Client) newKey() (crypto.Signer, error) {
	switch {
	case c.NewKey != nil:
		return c.NewKey()
	case c.ZTunnel:
		return P256()
	}
	return RSA()
}

// Send sends a request as it is given.
func (c *Client) Send(ctx context.Context, csr string, meta *structpb.Struct) (*istiov1.IstioCertificateResponse, error) {
	conn, err := c.dial()
	if err != nil {
		return nil, err
	}
	var headers []string
	if c.Token != nil {
		token, err := c.Token()
		if err != nil {
			return nil, err
		}
		headers = append(headers, "authorization", "Bearer "+token)
	}
	if c.ClusterID != "" {
		headers = append(headers, "clusterid", c.ClusterID)
	}
	validity := c.Validity
	if validity == 0 {
		validity = 86400
	}
	c.Calls++
	return istiov1.NewIstioCertificateServiceClient(conn).CreateCertificate(metadata.AppendToOutgoingContext(ctx, headers...),
		&istiov1.IstioCertificateRequest{Csr: csr, ValidityDuration: validity, Metadata: meta})
}

// metadata is what a request has: istio-agent always names a signer, by default
// the empty one; ztunnel says nothing, or whom it asks for.
func (c *Client) metadata() *structpb.Struct {
	switch {
	case !c.ZTunnel:
		return &structpb.Struct{Fields: map[string]*structpb.Value{"CertSigner": structpb.NewStringValue("")}}
	case c.Impersonate != "":
		return &structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewStringValue(c.Impersonate)}}
	}
	return nil
}

// csr names the identity in a critical extension, and istio-agent has an
// organization besides, an empty one.
func (c *Client) csr(key crypto.Signer) (string, error) {
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(cmp.Or(c.Names, c.identity()))}})
	if err != nil {
		return "", err
	}
	template := x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}}}
	if !c.ZTunnel {
		template.Subject = pkix.Name{Organization: []string{""}}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}

func (c *Client) identity() string {
	if c.Impersonate != "" {
		return c.Impersonate
	}
	return c.Identity
}

func (c *Client) dial() (*grpc.ClientConn, error) {
	if c.conn != nil {
		return c.conn, nil
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(c.Roots()) {
		return nil, errors.New("the root file has no certificate")
	}
	settings := &tls.Config{RootCAs: pool, ServerName: c.ServerName, MinVersion: tls.VersionTLS12}
	if c.ZTunnel {
		settings.MinVersion = tls.VersionTLS13
	}
	var err error
	c.conn, err = grpc.NewClient(c.Address, grpc.WithTransportCredentials(credentials.NewTLS(settings)), grpc.WithDisableRetry(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}))
	return c.conn, err
}

// Close ends the connection; the next call makes a new one.
func (c *Client) Close() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

// judge takes an answer apart and verifies it: two elements at least, one
// certificate in each but the last, which has the roots; the leaf is for the key
// and for who was asked for, and chains to a root for both purposes of TLS.
func (c *Client) judge(key crypto.Signer, chain []string) (*Answer, error) {
	if len(chain) < 2 {
		return nil, errors.New("invalid empty CertChain")
	}
	a := &Answer{Key: key, Chain: chain}
	var err error
	if a.Roots, err = parse(chain[len(chain)-1]); err != nil {
		return nil, fmt.Errorf("roots: %w", err)
	}
	above := x509.NewCertPool()
	for i, text := range chain[:len(chain)-1] {
		certs, err := parse(text)
		switch {
		case err != nil:
			return nil, fmt.Errorf("element %d: %w", i, err)
		case len(certs) != 1:
			return nil, fmt.Errorf("element %d has %d certificates", i, len(certs))
		case i == 0:
			a.Leaf = certs[0]
		default:
			above.AddCert(certs[0])
		}
	}
	if !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(a.Leaf.PublicKey) {
		return nil, errors.New("the certificate is for another key")
	}
	if len(a.Leaf.URIs) != 1 || a.Leaf.URIs[0].String() != c.identity() {
		return nil, fmt.Errorf("the certificate is for %v", a.Leaf.URIs)
	}
	return a, a.verify(above)
}

func (a *Answer) verify(above *x509.CertPool) error {
	roots := x509.NewCertPool()
	for _, r := range a.Roots {
		roots.AddCert(r)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := a.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: above, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			return fmt.Errorf("verify: %w", err)
		}
	}
	return nil
}

func parse(text string) (certs []*x509.Certificate, err error) {
	for rest := []byte(text); len(rest) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("not PEM certificates alone")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate")
	}
	return certs, nil
}

// TLS is what a proxy serves and calls with: the whole answer is its chain, the
// last element its trust.
func (a *Answer) TLS() tls.Certificate {
	cert := tls.Certificate{PrivateKey: a.Key, Leaf: a.Leaf}
	for _, text := range a.Chain {
		for rest := []byte(text); ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			cert.Certificate = append(cert.Certificate, block.Bytes)
		}
	}
	return cert
}
