package main

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func newSVIDCommand(t *tool) *cobra.Command {
	return group("svid", "X.509-SVIDs of this process, from the Workload API",
		newSVIDFetchCommand(t), newSVIDWatchCommand(t), newSVIDVerifyCommand(t))
}

// material is one complete answer of the Workload API, cut down to the
// identities that were asked for, or an SVID that was minted.
type material struct {
	svids   []*x509svid.SVID // at least one; the first is the default identity
	bundles []*x509bundle.Bundle
}

// svidShape is one X.509-SVID in JSON. PrivateKeyPEM is empty unless
// --with-key was given.
type svidShape struct {
	SPIFFEID        string    `json:"spiffe_id"`
	Hint            string    `json:"hint"`
	Serial          string    `json:"serial"`
	NotBefore       time.Time `json:"not_before"`
	NotAfter        time.Time `json:"not_after"`
	CertificatesPEM string    `json:"certificates_pem"`
	PrivateKeyPEM   string    `json:"private_key_pem"`
}

// trustShape is the X.509 bundle of one trust domain in JSON.
type trustShape struct {
	TrustDomain     string `json:"trust_domain"`
	Roots           int    `json:"roots"`
	CertificatesPEM string `json:"certificates_pem"`
}

// picker chooses among several identities.
type picker struct {
	hint, id string
	hintSet  bool
}

func (p *picker) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.id, "id", "", "only the identity with this SPIFFE ID")
	cmd.Flags().StringVar(&p.hint, "hint", "", "only the identity with this hint")
}

func (p *picker) check(cmd *cobra.Command) error {
	p.hintSet = cmd.Flags().Changed("hint")
	if p.id == "" {
		return nil
	}
	_, err := parseID("--id", p.id)
	return err
}

// pick keeps the identities that match.
func (p *picker) pick(c *workloadapi.X509Context) (material, error) {
	m := material{bundles: c.Bundles.Bundles()}
	for _, s := range c.SVIDs {
		if (p.id == "" || s.ID.String() == p.id) && (!p.hintSet || s.Hint == p.hint) {
			m.svids = append(m.svids, s)
		}
	}
	if len(m.svids) == 0 {
		return material{}, fault.Newf(fault.NotFound, "identity_not_found",
			"none of the %d identities of this process has that ID and hint: see assay svid fetch", len(c.SVIDs))
	}
	return m, nil
}

// positional says whether files of m would be told apart by their place alone:
// several identities came and nothing was said to pick one.
func (p *picker) positional(m material) bool {
	return len(m.svids) > 1 && p.id == "" && !p.hintSet
}

// errSeveral is the warning about it: which entry comes first changes when one
// is made or deleted, and then svid.pem is another identity.
func errSeveral(m material) error {
	return fault.Newf(fault.Precondition, "several_identities",
		"%d identities came and svid.pem is the first, now %s: it changes when entries come or go; with several identities always name one, with --id or --hint",
		len(m.svids), m.svids[0].ID)
}

// bundle returns the roots for a trust domain.
func (m material) bundle(td spiffeid.TrustDomain) []*x509.Certificate {
	for _, b := range m.bundles {
		if b.TrustDomain() == td {
			return b.X509Authorities()
		}
	}
	return nil
}

func serial(cert *x509.Certificate) string { return fmt.Sprintf("%x", cert.SerialNumber) }

func svidFrom(s *x509svid.SVID, withKey bool) (svidShape, error) {
	leaf := s.Certificates[0]
	shape := svidShape{
		SPIFFEID: s.ID.String(), Hint: s.Hint, Serial: serial(leaf),
		NotBefore: leaf.NotBefore.UTC(), NotAfter: leaf.NotAfter.UTC(),
		CertificatesPEM: string(certificatesPEM(s.Certificates)),
	}
	if !withKey {
		return shape, nil
	}
	key, err := keyPEM(s)
	shape.PrivateKeyPEM = string(key)
	return shape, err
}

func trustFrom(b *x509bundle.Bundle) trustShape {
	roots := b.X509Authorities()
	return trustShape{TrustDomain: b.TrustDomain().Name(), Roots: len(roots), CertificatesPEM: string(certificatesPEM(roots))}
}

func keyPEM(s *x509svid.SVID) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(s.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// files are what --dir gets. The default identity has the plain names, others
// a number; bundle.pem is the default identity's trust domain, the bundles of
// others have its name in theirs.
func (m material) files() ([]file, error) {
	var out []file
	for i, s := range m.svids {
		number := ""
		if i > 0 {
			number = "." + strconv.Itoa(i)
		}
		key, err := keyPEM(s)
		if err != nil {
			return nil, err
		}
		out = append(out,
			file{name: "svid" + number + ".pem", data: certificatesPEM(s.Certificates), perm: 0o644},
			file{name: "svid_key" + number + ".pem", data: key, perm: 0o600})
	}
	own := m.svids[0].ID.TrustDomain()
	for _, b := range m.bundles {
		name := "bundle.pem"
		if b.TrustDomain() != own {
			name = "bundle." + b.TrustDomain().Name() + ".pem"
		}
		out = append(out, file{name: name, data: certificatesPEM(b.X509Authorities()), perm: 0o644})
	}
	return out, nil
}

// write prints the identities as lines of name and value.
func (m material) write(w io.Writer, now time.Time) error {
	for i, s := range m.svids {
		if i > 0 {
			if _, err := io.WriteString(w, "\n"); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
		}
		leaf := s.Certificates[0]
		rows := table{}
		rows.add("spiffe id", s.ID.String())
		if s.Hint != "" {
			rows.add("hint", s.Hint)
		}
		rows.add("serial", serial(leaf))
		rows.add("valid", fmt.Sprintf("%s to %s (%s)", stamp(leaf.NotBefore), stamp(leaf.NotAfter), remaining(leaf.NotAfter, now)))
		rows.add("chain", count(len(s.Certificates), "certificate"))
		rows.add("roots", fmt.Sprintf("%d of %s", len(m.bundle(s.ID.TrustDomain())), s.ID.TrustDomain().Name()))
		if err := rows.write(w); err != nil {
			return err
		}
	}
	return nil
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}
