package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	// identityTimeout is how long the Workload API may take to say who we are.
	identityTimeout = 10 * time.Second
	// maxKeyFile is larger than any private key in PEM.
	maxKeyFile = 64 << 10
)

// operator is who asks a remote server. A command may run for longer than its
// certificate lives, so each new connection looks whether it is time to read
// it again.
type operator struct {
	id   spiffeid.ID
	read func(context.Context) (*x509svid.SVID, []*x509.Certificate, error)

	mu      sync.Mutex
	svid    *x509svid.SVID
	trusted []*x509.Certificate
}

// operator finds out who we are.
func (t *tool) operator(ctx context.Context) (*operator, error) {
	from, place := "--identity", t.remote.identity
	if place == "" {
		from, place = identityEnv, t.getenv(identityEnv)
	}
	pick := picker{id: t.remote.as}
	if pick.id != "" {
		if _, err := parseID("--as", pick.id); err != nil {
			return nil, err
		}
	}
	o := &operator{}
	if place == "" || strings.HasPrefix(place, "unix:") || strings.HasPrefix(place, "tcp:") {
		e, err := t.endpointAt(from, place)
		if err != nil {
			return nil, err
		}
		o.read = func(ctx context.Context) (*x509svid.SVID, []*x509.Certificate, error) {
			answer, err := t.fetch(ctx, e, identityTimeout)
			if err != nil {
				return nil, nil, err
			}
			m, err := pick.pick(answer)
			if err != nil {
				return nil, nil, err
			}
			return m.svids[0], m.bundle(m.svids[0].ID.TrustDomain()), nil
		}
	} else {
		o.read = func(context.Context) (*x509svid.SVID, []*x509.Certificate, error) {
			return readIdentity(from, place, pick.id)
		}
	}
	var err error
	if o.svid, o.trusted, err = o.read(ctx); err != nil {
		return nil, err
	}
	o.id = o.svid.ID
	return o, nil
}

// readIdentity reads the files that assay svid fetch and watch write.
func readIdentity(from, dir, as string) (*x509svid.SVID, []*x509.Certificate, error) {
	// Below this link is one set, also while the next one is put in place.
	if set, err := filepath.EvalSymlinks(filepath.Join(dir, innerDir, currentLink)); err == nil {
		dir = set
	}
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return nil, nil, usageError(from + " " + quote(dir) + " is no directory with svid.pem, svid_key.pem and bundle.pem, and no URI of a Workload API such as " + defaultEndpoint)
	}
	chain, err := readCertificates(from, filepath.Join(dir, "svid.pem"), parsePEM)
	if err != nil {
		return nil, nil, err
	}
	bundleFile := filepath.Join(dir, "bundle.pem")
	roots, err := readCertificates(from, bundleFile, parseBundle)
	if err != nil {
		return nil, nil, err
	}
	if err := checkRoots(from, bundleFile, roots); err != nil {
		return nil, nil, err
	}
	key, err := durable.ReadSecret(filepath.Join(dir, "svid_key.pem"), maxKeyFile)
	if err != nil {
		return nil, nil, err
	}
	svid, err := x509svid.Parse(certificatesPEM(chain), key)
	if err != nil {
		return nil, nil, fault.Wrap(fault.Invalid, err, "identity_invalid", from+" "+dir+" holds no X.509-SVID with its key")
	}
	if as != "" && svid.ID.String() != as {
		return nil, nil, fault.New(fault.NotFound, "identity_not_found", from+" "+dir+" is for "+svid.ID.String()+", not for the ID of --as")
	}
	return svid, roots, nil
}

// refresh reads the identity again once half of its life is over. What is held
// stays when that fails: the server says if it is too old.
func (o *operator) refresh() {
	leaf := o.svid.Certificates[0]
	if time.Now().Before(leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), identityTimeout)
	defer cancel()
	if svid, trusted, err := o.read(ctx); err == nil && svid.ID == o.id {
		o.svid, o.trusted = svid, trusted
	}
}

// leaf is the certificate for the next handshake.
func (o *operator) leaf() *tls.Certificate {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.refresh()
	cert := &tls.Certificate{PrivateKey: o.svid.PrivateKey, Leaf: o.svid.Certificates[0]}
	for _, c := range o.svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert
}

// roots are what the server has to chain to.
func (o *operator) roots() []*x509.Certificate {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.trusted
}
