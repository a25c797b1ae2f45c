package ca

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/server/audit"
)

// X509Request asks for one certificate. Identity and names are what the server
// has looked up; only the public key is the requester's.
type X509Request struct {
	Kind      Kind
	ID        spiffeid.ID
	PublicKey crypto.PublicKey
	DNSNames  []string
	// IPAddresses are for a server that clients reach by them; no other kind has
	// any.
	IPAddresses []netip.Addr
	TTL         time.Duration // zero: the default of the kind; longer than the cap: the cap
	NotAfter    time.Time     // of the right itself; no certificate outlives it. Zero: no end
	Cluster     string        // the subject's organizational unit, information only

	// What the audit line says besides.
	EntryID       string
	EntryRevision int64
	Rule          string // by which rule it is allowed
}

// X509SVID is the answer to one request: a certificate, or Err.
type X509SVID struct {
	Chain               [][]byte // DER: leaf, issuer
	Serial              string   // lower-case hex
	NotBefore, NotAfter time.Time
	AuthorityID         string // the root that the chain ends at
	Err                 error
}

// planned is one request on its way through the issuance cycle.
type planned struct {
	req   X509Request
	class class
	err   error // why nothing is signed

	id                  spiffeid.ID
	cluster             string
	dnsNames            []string
	ipAddresses         []netip.Addr
	spki                []byte
	spkiHash            [sha256.Size]byte
	notBefore, notAfter time.Time
	serial              serial
	der                 []byte
}

// batch is the requests of one call, planned under one issuer.
type batch struct {
	issuer *issuer
	items  []planned
}

// replans bounds how often a plan is made anew because the active root changed
// under it.
const replans = 3

// IssueX509 signs certificates. An error means that nothing was signed; else
// each answer has a certificate or an error of its own, in the order of the
// requests. The steps are those of the package's description.
func (a *Authority) IssueX509(ctx context.Context, by audit.Origin, reqs []X509Request) ([]X509SVID, error) {
	// Steps 1 and 2.
	b, err := a.planUnderMarks(ctx, reqs)
	if err != nil {
		return nil, err
	}
	// Step 3. Serials are drawn for what will be signed, not for refusals.
	for i := range b.items {
		if l := &b.items[i]; l.err == nil {
			if l.serial, err = a.serials.next(); err != nil {
				return nil, err
			}
		}
	}
	if err := a.audit.Record(ctx, b.lines(by)...); err != nil {
		return nil, err
	}
	failpoint.Hit("audit_written")
	// Step 4.
	b.sign()
	// Step 5.
	return a.answers(b), nil
}

// planUnderMarks plans all requests and raises the marks over the plan. Both
// belong to one root; when another becomes active in between, both are done
// again.
func (a *Authority) planUnderMarks(ctx context.Context, reqs []X509Request) (*batch, error) {
	for range replans {
		now := time.Now()
		if err := a.ready(now); err != nil {
			return nil, err
		}
		iss := a.current.Load().issuer
		if err := iss.usable(now); err != nil {
			return nil, err
		}
		b := &batch{issuer: iss, items: make([]planned, len(reqs))}
		var need marks
		for i, req := range reqs {
			b.items[i] = a.profiles.plan(req, iss.cert, now)
			if l := &b.items[i]; l.err == nil {
				need.include(l.class, l.notAfter)
			}
		}
		err := a.coverMarks(ctx, iss.rootID, need)
		if !errors.Is(err, errSuperseded) {
			return b, err
		}
	}
	return nil, fault.New(fault.NotReady, "issuer_not_ready", "the active root keeps changing: try again")
}

// usable says whether anything can be signed under the issuer at now.
func (iss *issuer) usable(now time.Time) error {
	switch {
	case iss == nil:
		return fault.New(fault.NotReady, "issuer_not_ready", "there is no issuer under the active root yet: try again")
	case now.Before(iss.cert.NotBefore):
		return fault.New(fault.NotReady, "clock_backwards", "the clock shows a time before the issuer was made: correct the server's clock")
	case !now.Before(iss.cert.NotAfter):
		return fault.New(fault.NotReady, "issuer_expired", "the issuer has ended and a new one could not be made: see the server's log")
	}
	return nil
}

// plan decides what the certificate for req will hold, or why there will be
// none. It depends on its arguments alone.
func (p *profiles) plan(req X509Request, iss *x509.Certificate, now time.Time) planned {
	l := planned{req: req, id: req.ID, cluster: req.Cluster, dnsNames: req.DNSNames, ipAddresses: req.IPAddresses}
	if req.Kind < 0 || int(req.Kind) >= len(p.leaf) {
		l.err = fault.New(fault.Invalid, "kind_unknown", "the kind of certificate is not known")
		return l
	}
	shape := &p.leaf[req.Kind]
	l.class = shape.class
	if l.err = shape.checkID(req.ID); l.err != nil {
		return l
	}
	if l.err = checkKey(req.PublicKey); l.err != nil {
		return l
	}
	if l.err = checkCluster(req.Cluster); l.err != nil {
		return l
	}
	if l.err = name.CheckDNS(req.DNSNames); l.err != nil {
		return l
	}
	if len(req.IPAddresses) > 0 && (req.Kind != Server || slices.ContainsFunc(req.IPAddresses, func(ip netip.Addr) bool { return !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" })) {
		l.err = fault.New(fault.Invalid, "ip_address_invalid", "an IP address is not one, or of a certificate that can't have any")
		return l
	}
	life, backdate, err := shape.lifetime(req.TTL)
	if err != nil {
		l.err = err
		return l
	}
	// Never past anything above it (X509-20); the marks are raised over it.
	l.notBefore = latest(now.Add(-backdate).UTC().Truncate(time.Second), iss.NotBefore)
	l.notAfter = earliest(now.Add(life).UTC().Truncate(time.Second), iss.NotAfter)
	if end := req.NotAfter; !end.IsZero() {
		l.notAfter = earliest(l.notAfter, end.UTC().Truncate(time.Second))
		if !l.notAfter.After(now) {
			l.err = fault.New(fault.Denied, "right_expired", "the right to this certificate is over")
			return l
		}
	}
	if !l.notAfter.After(now) {
		l.err = fault.New(fault.NotReady, "issuer_expired", "the issuer ends before the certificate could be used: try again")
		return l
	}
	if l.spki, err = x509.MarshalPKIXPublicKey(req.PublicKey); err != nil {
		l.err = fault.Wrap(fault.Invalid, err, "key_not_allowed", "the public key can't be encoded")
		return l
	}
	l.spkiHash = sha256.Sum256(l.spki)
	return l
}

// lines are the audit lines of a batch: what is about to be signed, and what
// is refused.
func (b *batch) lines(by audit.Origin) []audit.Line {
	ski := hex.EncodeToString(b.issuer.cert.SubjectKeyId)
	lines := make([]audit.Line, len(b.items))
	for i := range b.items {
		l := &b.items[i]
		lines[i] = audit.Line{
			Origin: by,
			Action: "x509_svid.issue",
			Target: audit.Target{
				SPIFFEID: l.id.String(), EntryID: l.req.EntryID, EntryRevision: l.req.EntryRevision,
				AuthorityID: b.issuer.rootID,
			},
			Why: audit.Why{Rule: l.req.Rule},
		}
		if l.err != nil {
			lines[i].Result = audit.Result{Code: fault.KindOf(l.err).Error(), Reason: fault.ReasonOf(l.err)}
			continue
		}
		lines[i].Result = audit.Result{Code: "ok"}
		lines[i].Cert = &audit.Cert{
			Serial: hex.EncodeToString(l.serial[:]), SPKISHA256: hex.EncodeToString(l.spkiHash[:]),
			NotBefore: l.notBefore, NotAfter: l.notAfter, IssuerSKI: ski,
		}
	}
	return lines
}

// sign makes the certificates of a batch, each core taking the next one that
// nobody has begun.
func (b *batch) sign() {
	workers := min(runtime.GOMAXPROCS(0), len(b.items))
	var next atomic.Int64
	work := func() {
		for {
			i := int(next.Add(1)) - 1
			if i >= len(b.items) {
				return
			}
			b.signOne(&b.items[i])
		}
	}
	var wg sync.WaitGroup
	for range workers - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
}

func (b *batch) signOne(l *planned) {
	if l.err != nil {
		return
	}
	tbs, err := b.issuer.templates[l.req.Kind].tbs(l)
	if err == nil {
		l.der, err = signTBS(tbs, b.issuer.key)
	}
	if err != nil {
		l.err = fault.Wrap(fault.Internal, err, "sign_failed", "the certificate could not be signed: see the server's log")
	}
}

func (a *Authority) answers(b *batch) []X509SVID {
	out := make([]X509SVID, len(b.items))
	var signed [len(kindNames)]int
	for i := range b.items {
		l := &b.items[i]
		if l.err != nil {
			out[i].Err = l.err
			continue
		}
		signed[l.req.Kind]++
		out[i] = X509SVID{
			Chain:  [][]byte{l.der, b.issuer.cert.Raw},
			Serial: hex.EncodeToString(l.serial[:]), NotBefore: l.notBefore, NotAfter: l.notAfter,
			AuthorityID: b.issuer.rootID,
		}
	}
	for k, n := range signed {
		a.metrics.signed.WithLabelValues(Kind(k).String()).Add(float64(n))
	}
	return out
}
