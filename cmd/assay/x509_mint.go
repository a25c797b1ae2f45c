package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	spirebundle "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	spiresvid "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func newX509Command(t *tool) *cobra.Command {
	return group("x509", "X.509-SVIDs straight from the server, without an agent", newX509MintCommand(t))
}

// mintFlags are the flags of `x509 mint`.
type mintFlags struct {
	spiffeID string
	ttl      time.Duration
	dnsNames []string
	dir      string
	replace  bool
	withKey  bool
}

func newX509MintCommand(t *tool) *cobra.Command {
	var f mintFlags
	cmd := &cobra.Command{
		Use:   "mint",
		Short: "Mint an X.509-SVID by hand",
		Long: `Have the server sign one X.509-SVID for any SPIFFE ID of its trust domain, without
an entry, a node or an agent: for a bootstrap, a repair or a test. Nobody renews
it, and nobody can take it back before its end. The server writes down who
minted it.

The private key is made here and is never sent. Say where it goes: with --write
chain, key and roots are written to svid.pem, svid_key.pem (mode 0600) and
bundle.pem, all at the same instant, as svid fetch --dir does; files of these
names that are there already stay, unless --replace says otherwise. With
--with-key and -o json it is in the output, which has the form of svid fetch.

A --ttl beyond the server's ca.max_x509_svid_ttl is cut to that, with a warning.

  $ assay x509 mint --spiffe-id spiffe://example.org/backup --ttl 30m --write /run/backup/tls`,
		Args: noArgs,
	}
	cmd.RunE = t.localVerb(func(ctx context.Context, s *serverConn, _ []string) error { return t.mint(ctx, s, f) })
	fl := cmd.Flags()
	fl.StringVar(&f.spiffeID, "spiffe-id", "", "identity of the SVID, as spiffe://example.org/web (needed)")
	fl.DurationVar(&f.ttl, "ttl", 0, "lifetime (default: the server's)")
	fl.StringArrayVar(&f.dnsNames, "dns", nil, "DNS name for the certificate; repeat for several")
	fl.StringVar(&f.dir, "write", "", "directory to write the files to; made if missing")
	fl.BoolVar(&f.replace, "replace", false, "replace files that are there already")
	fl.BoolVar(&f.withKey, "with-key", false, "put the private key into the JSON output")
	return t.localFlags(cmd)
}

func (t *tool) mint(ctx context.Context, s *serverConn, f mintFlags) error {
	id, ttl, err := f.check(t.format)
	if err != nil {
		return err
	}
	// Before the server signs: a certificate whose key can't be kept is one
	// more that nobody needs.
	var out *output
	if f.dir != "" {
		if out, err = openOutput(f.dir); err != nil {
			return err
		}
		defer out.close()
		if err := out.mayWrite(f.replace); err != nil {
			return err
		}
	}
	began := time.Now()
	m, err := mintMaterial(ctx, s, id, ttl, f.dnsNames)
	if err != nil {
		return err
	}
	if end := m.svids[0].Certificates[0].NotAfter; end.Before(began.Add(f.ttl - 10*time.Second)) {
		t.warn(fault.Newf(fault.Precondition, "ttl_cut", "the server gave less than the %s that were asked for: %s", f.ttl, remaining(end, began)))
	}
	var files []string
	dir := ""
	if out != nil {
		if files, err = out.save(m); err != nil {
			return err
		}
		dir = out.dir
	}
	return t.show(m, f.withKey, dir, files)
}

// check reads the flags, or says which is wrong.
func (f mintFlags) check(form format) (spiffeid.ID, int32, error) {
	id, err := parseID("--spiffe-id", f.spiffeID)
	if err != nil {
		return spiffeid.ID{}, 0, err
	}
	ttl, err := ttlSeconds(f.ttl)
	switch {
	case err != nil:
		return spiffeid.ID{}, 0, err
	case f.withKey && form != formatJSON:
		err = usageError("--with-key needs -o json; --write writes the key to a file")
	case f.dir == "" && !f.withKey:
		err = usageError("the key would be lost: add --write DIR, or --with-key and -o json")
	case f.replace && f.dir == "":
		err = usageError("--replace needs --write")
	}
	return id, ttl, err
}

// mintMaterial makes a key, has it certified and checks what came back.
func mintMaterial(ctx context.Context, s *serverConn, id spiffeid.ID, ttl int32, dnsNames []string) (material, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return material{}, fmt.Errorf("make key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URL()}, DNSNames: dnsNames}, key)
	if err != nil {
		return material{}, fault.Wrap(fault.Invalid, err, "dns_name_invalid", "the names can't be put into a request")
	}
	resp, err := ask(ctx, s, s.svids.MintX509SVID, &spiresvid.MintX509SVIDRequest{Csr: csr, Ttl: ttl})
	if err != nil {
		return material{}, err
	}
	chain, err := chainOf(resp.GetSvid())
	if err != nil || !key.PublicKey.Equal(chain[0].PublicKey) {
		return material{}, badAnswer("a certificate for the key")
	}
	// After the signature, so that the root is among them even if another one
	// became active meanwhile.
	bundle, err := ask(ctx, s, s.bundles.GetBundle, &spirebundle.GetBundleRequest{})
	if err != nil {
		return material{}, err
	}
	roots, err := rootsOf(bundle)
	if err != nil {
		return material{}, badAnswer("well-formed roots")
	}
	if _, err := verify(chain, roots, id.String(), time.Now()); err != nil {
		return material{}, fault.Wrap(fault.Internal, err, "bad_answer", "the certificate does not verify against the server's own bundle: "+fault.SafeText(err))
	}
	return material{
		svids:   []*x509svid.SVID{{ID: id, Certificates: chain, PrivateKey: key}},
		bundles: []*x509bundle.Bundle{x509bundle.FromX509Authorities(id.TrustDomain(), roots)},
	}, nil
}

func chainOf(svid *types.X509SVID) ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	for _, der := range svid.GetCertChain() {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, cert)
	}
	if len(chain) == 0 {
		return nil, errors.New("no certificate")
	}
	return chain, nil
}

// mayWrite says whether the files of an SVID can be written without taking the
// place of others. Whoever else writes here is kept out by the lock.
func (o *output) mayWrite(replace bool) error {
	for _, name := range []string{"svid.pem", "svid_key.pem", "bundle.pem"} {
		path := filepath.Join(o.dir, name)
		switch _, err := os.Lstat(path); {
		case err == nil && replace, errors.Is(err, fs.ErrNotExist):
		case err == nil:
			return fault.New(fault.Exists, "file_exists", path+" is there already: choose another directory, or add --replace")
		default:
			return diskFault("look at", path, err)
		}
	}
	return nil
}
