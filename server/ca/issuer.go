package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/keys"
)

// issuer is this server's own intermediate. Its key is in memory only and ends
// with the process: a restart makes a new one and leaves nothing behind, as
// the bundle holds roots and no issuers.
type issuer struct {
	id        string
	rootID    string
	rootEnds  time.Time
	key       crypto.Signer
	cert      *x509.Certificate
	templates [len(kindNames)]leafTemplate
}

// IssuerInfo describes the issuer that signs at the moment.
type IssuerInfo struct {
	ID          string
	AuthorityID string // the root it chains to
	NotAfter    time.Time
}

// Issuer returns what signs at the moment; zero if nothing does.
func (a *Authority) Issuer() IssuerInfo {
	iss := a.current.Load().issuer
	if iss == nil {
		return IssuerInfo{}
	}
	return IssuerInfo{ID: iss.id, AuthorityID: iss.rootID, NotAfter: iss.cert.NotAfter}
}

// issuerEnd is the end of an issuer made at now under a root that ends at
// rootEnds.
func (a *Authority) issuerEnd(now, rootEnds time.Time) time.Time {
	return earliest(now.Add(a.cfg.IssuerTTL).UTC().Truncate(time.Second), rootEnds)
}

// issuerDue says whether the longest certificate will soon not fit under iss
// any more, and a new issuer would change that. Under a root that is about to
// end it would not.
func (a *Authority) issuerDue(iss *issuer, now time.Time) bool {
	if iss == nil {
		return true
	}
	wanted := now.Add(a.cfg.longestStream(a.agentTTL) + headroom)
	return iss.cert.NotAfter.Before(wanted) && iss.cert.NotAfter.Before(a.issuerEnd(now, iss.rootEnds))
}

// makeIssuer makes a key and has the root certify it. The root's key is opened
// for this one signature.
func (a *Authority) makeIssuer(ctx context.Context, root *authority) (*issuer, error) {
	now := time.Now()
	if !root.cert.NotAfter.After(now) {
		return nil, fault.Newf(fault.Precondition, "ca_expired",
			"the active root ended at %s: check the clock; if it is right, restore a backup with a newer root", root.cert.NotAfter.Format(time.RFC3339))
	}
	if now.Before(root.cert.NotBefore) {
		return nil, fault.Newf(fault.NotReady, "clock_backwards",
			"the clock shows a time before the root was made, at %s: correct the server's clock", root.cert.NotBefore.Add(rootBackdate).Format(time.RFC3339))
	}
	rootKey, err := a.openRootKey(ctx, root)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate issuer key: %w", err)
	}
	number, err := a.serials.next()
	if err != nil {
		return nil, err
	}
	p := a.profiles.issuer
	template, err := p.authorityTemplate(number, key.Public(), latest(now.Add(-p.backdate), root.cert.NotBefore), a.issuerEnd(now, root.cert.NotAfter))
	if err != nil {
		return nil, err
	}
	if err := a.auditAuthority(ctx, "issuer.create", root.record.ID, template, hex.EncodeToString(root.cert.SubjectKeyId)); err != nil {
		return nil, err
	}
	cert, err := p.signAuthority(template, root.cert, key.Public(), rootKey)
	if err != nil {
		return nil, err
	}
	iss, err := newIssuer(cert, key, root.record.ID, root.cert.NotAfter, &a.profiles)
	if err != nil {
		return nil, err
	}
	a.log.LogAttrs(ctx, slog.LevelInfo, "issuer made",
		slog.String("issuer_id", iss.id), slog.String("authority_id", iss.rootID), slog.Time("not_after", cert.NotAfter))
	return iss, nil
}

func newIssuer(cert *x509.Certificate, key crypto.Signer, rootID string, rootEnds time.Time, shapes *profiles) (*issuer, error) {
	iss := &issuer{id: hex.EncodeToString(cert.SubjectKeyId), rootID: rootID, rootEnds: rootEnds, key: key, cert: cert}
	for k, p := range shapes.leaf {
		template, err := newLeafTemplate(p, cert)
		if err != nil {
			return nil, err
		}
		iss.templates[k] = template
	}
	return iss, nil
}

func (a *Authority) openRootKey(ctx context.Context, root *authority) (crypto.Signer, error) {
	key, err := a.keys.Open(ctx, root.record.KeyRef)
	if err != nil {
		return nil, fmt.Errorf("open key of authority %s: %w", root.record.ID, err)
	}
	id, err := keys.ID(key.Public())
	if err != nil {
		return nil, err
	}
	if id != root.record.ID {
		return nil, corrupt("the key of authority %s is another one's", root.record.ID)
	}
	return key, nil
}

// authorityTemplate is the certificate of a root or issuer before it is signed.
func (p Profile) authorityTemplate(number serial, pub crypto.PublicKey, notBefore, notAfter time.Time) (*x509.Certificate, error) {
	id, err := keys.ID(pub)
	if err != nil {
		return nil, err
	}
	ski, err := hex.DecodeString(id)
	if err != nil {
		return nil, fmt.Errorf("decode authority id: %w", err)
	}
	return &x509.Certificate{
		SerialNumber:       number.bigInt(),
		Subject:            p.subject,
		URIs:               []*url.URL{p.td.ID().URL()}, // X509-15
		NotBefore:          notBefore.UTC().Truncate(time.Second),
		NotAfter:           notAfter.UTC().Truncate(time.Second),
		SignatureAlgorithm: x509.ECDSAWithSHA256,
		PublicKey:          pub,
		SubjectKeyId:       ski,
		KeyUsage:           p.keyUsage,
		ExtKeyUsage:        p.extKeyUsage,

		BasicConstraintsValid: true,
		IsCA:                  p.ca,
		MaxPathLen:            p.maxPathLen,
		MaxPathLenZero:        p.maxPathLen == 0,
	}, nil
}

// signAuthority signs a root (parent is the template itself) or an issuer.
// Package x509 verifies the signature, and what came out is linted.
func (p Profile) signAuthority(template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", p.name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse signed %s: %w", p.name, err)
	}
	return cert, Lint(cert, p)
}

// auditAuthority records that a root or an issuer is about to be signed.
func (a *Authority) auditAuthority(ctx context.Context, action, rootID string, template *x509.Certificate, issuerSKI string) error {
	spki, err := x509.MarshalPKIXPublicKey(template.PublicKey)
	if err != nil {
		return fmt.Errorf("encode public key: %w", err)
	}
	sum := sha256.Sum256(spki)
	return a.audit.Record(ctx, audit.Line{
		Origin: audit.Origin{Actor: audit.Actor{Kind: "server"}},
		Action: action,
		Target: audit.Target{SPIFFEID: a.td.IDString(), AuthorityID: rootID},
		Result: audit.Result{Code: "ok"},
		Cert: &audit.Cert{
			Serial: hexSerial(template.SerialNumber), SPKISHA256: hex.EncodeToString(sum[:]),
			NotBefore: template.NotBefore, NotAfter: template.NotAfter, IssuerSKI: issuerSKI,
		},
	})
}

func hexSerial(n *big.Int) string { return hex.EncodeToString(n.Bytes()) }

func earliest(first time.Time, more ...time.Time) time.Time {
	for _, t := range more {
		if t.Before(first) {
			first = t
		}
	}
	return first
}

func latest(x, y time.Time) time.Time {
	if x.After(y) {
		return x
	}
	return y
}
