package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	spirebundle "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// bundleShape is what `bundle show -o json` prints: the roots of the trust
// domain with what can be said about each.
type bundleShape struct {
	TrustDomain        string      `json:"trust_domain"`
	Sequence           uint64      `json:"sequence"`
	RefreshHintSeconds int64       `json:"refresh_hint_seconds"`
	X509Authorities    []rootShape `json:"x509_authorities"`
}

// rootShape is one root. ID is the hex of its subject key identifier.
type rootShape struct {
	ID             string    `json:"id"`
	NotAfter       time.Time `json:"not_after"`
	Tainted        bool      `json:"tainted"`
	CertificatePEM string    `json:"certificate_pem"`
}

func newBundleCommand(t *tool) *cobra.Command {
	return group("bundle", "The trust bundle: what others verify SVIDs with", newBundleShowCommand(t))
}

func newBundleShowCommand(t *tool) *cobra.Command {
	var asked string
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show the trust bundle",
		Long: `Show the trust bundle of the server's trust domain: as PEM certificates, or as
a SPIFFE bundle (a JWK Set). With -o json and without --format, as JSON with
the roots' dates and states.

  $ assay bundle show > bundle.pem
  $ assay bundle show --format spiffe > bundle.json`,
		Args: noArgs,
	}
	cmd.RunE = t.serverVerb(func(ctx context.Context, s *serverConn, _ []string) error {
		if asked != "pem" && asked != "spiffe" {
			return usageError("--format must be pem or spiffe, got " + quote(asked))
		}
		if asked == "pem" && cmd.Flags().Changed("format") && t.format == formatJSON {
			return usageError("--format pem is no JSON: leave out one of --format and -o")
		}
		return t.showBundle(ctx, s, asked)
	})
	cmd.Flags().StringVar(&asked, "format", "pem", "pem or spiffe")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"pem", "spiffe"}, cobra.ShellCompDirectiveNoFileComp))
	return t.serverFlags(cmd)
}

func (t *tool) showBundle(ctx context.Context, s *serverConn, asked string) error {
	bundle, err := ask(ctx, s, s.bundles.GetBundle, &spirebundle.GetBundleRequest{})
	if err != nil {
		return err
	}
	roots, err := rootsOf(bundle)
	if err != nil {
		return badAnswer("well-formed roots")
	}
	if asked == "spiffe" {
		doc, err := newJWKSet(roots, bundle.GetSequenceNumber(), bundle.GetRefreshHint())
		if err != nil {
			return fmt.Errorf("encode bundle: %w", err)
		}
		return t.printJSON(doc)
	}
	shape := bundleShape{
		TrustDomain: bundle.GetTrustDomain(), Sequence: bundle.GetSequenceNumber(),
		RefreshHintSeconds: bundle.GetRefreshHint(), X509Authorities: []rootShape{},
	}
	for i, root := range roots {
		shape.X509Authorities = append(shape.X509Authorities, rootShape{
			ID: fmt.Sprintf("%x", root.SubjectKeyId), NotAfter: root.NotAfter.UTC(),
			Tainted:        bundle.GetX509Authorities()[i].GetTainted(),
			CertificatePEM: string(certificatesPEM([]*x509.Certificate{root})),
		})
	}
	return t.print(shape, func(w io.Writer) error {
		var all strings.Builder
		for _, root := range shape.X509Authorities {
			all.WriteString(root.CertificatePEM)
		}
		if _, err := io.WriteString(w, all.String()); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
		return nil
	})
}

// rootsOf parses a bundle's certificates, one each.
func rootsOf(bundle *types.Bundle) ([]*x509.Certificate, error) {
	roots := []*x509.Certificate{}
	for _, authority := range bundle.GetX509Authorities() {
		root, err := x509.ParseCertificate(authority.GetAsn1())
		if err != nil {
			return nil, errors.New("parse root")
		}
		roots = append(roots, root)
	}
	return roots, nil
}
