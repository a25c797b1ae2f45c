package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
)

// verifyShape is what `svid verify -o json` prints for a valid SVID; for
// another there is the error object, whose reason is svid_invalid,
// svid_expired, svid_id_mismatch or bundle_invalid.
type verifyShape struct {
	Valid     bool      `json:"valid"`
	SPIFFEID  string    `json:"spiffe_id"`
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
}

func newSVIDVerifyCommand(t *tool) *cobra.Command {
	var svidFile, bundleFile, want string
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Verify an X.509-SVID against a bundle, offline",
		Long: `Verify a certificate chain by all rules of the X509-SVID standard, and by the
go-spiffe library, against the roots in a bundle (PEM, or a SPIFFE bundle in
JSON), at this moment. Nothing is
asked: that the bundle is the right one for the trust domain is yours to know.
The exit code is 65 if a rule is broken; the rule is named. A bundle that holds
anything but CA certificates is refused.

  $ assay svid verify --svid svid.pem --bundle bundle.pem \
      --id spiffe://example.org/web`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			if svidFile == "" || bundleFile == "" {
				return usageError("--svid and --bundle are needed")
			}
			shape, err := verifyFiles(svidFile, bundleFile, want, time.Now())
			if err != nil {
				return err
			}
			return t.print(shape, shape.write)
		},
	}
	cmd.Flags().StringVar(&svidFile, "svid", "", "PEM file with the certificate chain, leaf first (needed)")
	cmd.Flags().StringVar(&bundleFile, "bundle", "", "file with the roots (needed)")
	cmd.Flags().StringVar(&want, "id", "", "SPIFFE ID that it must have")
	return cmd
}

func (s verifyShape) write(w io.Writer) error {
	rows := table{}
	rows.add("spiffe id", s.SPIFFEID)
	rows.add("serial", s.Serial)
	rows.add("valid", fmt.Sprintf("%s to %s", stamp(s.NotBefore), stamp(s.NotAfter)))
	return rows.write(w)
}

func verifyFiles(svidFile, bundleFile, want string, now time.Time) (verifyShape, error) {
	if want != "" {
		if _, err := parseID("--id", want); err != nil {
			return verifyShape{}, err
		}
	}
	chain, err := readCertificates("--svid", svidFile, parsePEM)
	if err != nil {
		return verifyShape{}, err
	}
	roots, err := readCertificates("--bundle", bundleFile, parseBundle)
	if err != nil {
		return verifyShape{}, err
	}
	if err := checkRoots("--bundle", bundleFile, roots); err != nil {
		return verifyShape{}, err
	}
	return verify(chain, roots, want, now)
}

// checkRoots refuses a bundle with anything but CA certificates in it: a
// verifier takes whatever it is given as a root at its word, so that a leaf
// among the roots would prove itself.
func checkRoots(flag, file string, roots []*x509.Certificate) error {
	for i, root := range roots {
		if root.BasicConstraintsValid && root.IsCA && root.KeyUsage&x509.KeyUsageCertSign != 0 {
			continue
		}
		of := ""
		if len(root.URIs) > 0 {
			of = " (" + quote(root.URIs[0].String()) + ")"
		}
		return fault.Newf(fault.Invalid, "bundle_invalid",
			"%s %s: certificate %d%s is not a CA certificate, so it can't be a root: is it a bundle, and not an SVID?", flag, file, i+1, of)
	}
	return nil
}

// verify validates a chain. The trust domain is the leaf's own: whoever runs
// this has chosen the bundle for it.
func verify(chain, roots []*x509.Certificate, want string, now time.Time) (verifyShape, error) {
	claimed, err := rpc.LeafID(chain[0])
	if err != nil {
		return verifyShape{}, brokenRule(err)
	}
	pool := x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	id, err := rpc.VerifyPeer(chain, pool, claimed.TrustDomain(), now)
	if err != nil {
		return verifyShape{}, brokenRule(err)
	}
	// Peers use other libraries: what is called valid here, the one that most
	// of them use has to accept as well.
	bundle := x509bundle.FromX509Authorities(claimed.TrustDomain(), roots)
	if _, _, err := x509svid.Verify(chain, bundle, x509svid.WithTime(now)); err != nil {
		return verifyShape{}, fault.Wrap(fault.Invalid, err, "svid_invalid", "go-spiffe does not accept it")
	}
	if want != "" && id.String() != want {
		return verifyShape{}, fault.Newf(fault.Invalid, "svid_id_mismatch", "the certificate is for %s, not for %s", id, want)
	}
	leaf := chain[0]
	return verifyShape{
		Valid: true, SPIFFEID: id.String(), Serial: serial(leaf),
		NotBefore: leaf.NotBefore.UTC(), NotAfter: leaf.NotAfter.UTC(),
	}, nil
}

// brokenRule makes bad data of what is a refused peer elsewhere: here nobody
// asked to come in. The whole story is for the one who asked.
func brokenRule(err error) error {
	return fault.New(fault.Invalid, fault.ReasonOf(err), daemon.Describe(err).Message)
}

// maxCertificateFile is far more than any chain or bundle needs.
const maxCertificateFile = 4 << 20

func readCertificates(flag, path string, parse func([]byte) ([]*x509.Certificate, error)) ([]*x509.Certificate, error) {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.New(fault.NotFound, "file_missing", flag+" "+path+" does not exist")
		}
		return nil, diskFault("read", path, err)
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxCertificateFile+1))
	if err != nil {
		return nil, diskFault("read", path, err)
	}
	if len(data) > maxCertificateFile {
		return nil, fault.Newf(fault.Invalid, "file_too_large", "%s %s is larger than any certificate file", flag, path)
	}
	certs, err := parse(data)
	if err != nil {
		return nil, fault.New(fault.Invalid, "file_malformed", flag+" "+path+" "+err.Error())
	}
	if len(certs) == 0 {
		return nil, fault.New(fault.Invalid, "file_malformed", flag+" "+path+" holds no certificate")
	}
	return certs, nil
}
