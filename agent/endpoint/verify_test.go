package endpoint

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
)

func statusCode(err error) codes.Code { return status.Code(err) }

func TestIncompleteAnswersAreNotSent(t *testing.T) { // WL-28, WL-31, WL-33, WL-41 to WL-45, CLIENT-9, PLAN-3
	ca, other := newAuthority(t), newAuthority(t)
	cases := map[string]func(*cache.Snapshot){
		"no SVIDs":              func(s *cache.Snapshot) { s.SVIDs = nil },
		"no bundle":             func(s *cache.Snapshot) { s.BundleDER = nil },
		"bundle is no DER":      func(s *cache.Snapshot) { s.BundleDER = []byte("-----BEGIN CERTIFICATE-----") },
		"no trust domain":       func(s *cache.Snapshot) { s.TrustDomain = spiffeid.TrustDomain{} },
		"other trust domain":    func(s *cache.Snapshot) { s.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org") },
		"no certificate":        func(s *cache.Snapshot) { s.SVIDs[0].CertificatesDER = nil },
		"certificate cut short": func(s *cache.Snapshot) { s.SVIDs[0].CertificatesDER = s.SVIDs[0].CertificatesDER[:100] },
		"CA first":              func(s *cache.Snapshot) { s.SVIDs[0].CertificatesDER = ca.issuer.Raw },
		"no key":                func(s *cache.Snapshot) { s.SVIDs[0].Key = cache.PrivateKey{} },
		"another's key":         func(s *cache.Snapshot) { s.SVIDs[0].Key = s.SVIDs[1].Key },
		"SEC 1 key":             func(s *cache.Snapshot) { s.SVIDs[0].Key = cache.NewPrivateKey(s.SVIDs[0].Key.DER()[26:]) },
		"another ID":            func(s *cache.Snapshot) { s.SVIDs[0].ID = s.SVIDs[1].ID },
		"no ID":                 func(s *cache.Snapshot) { s.SVIDs[0].ID = spiffeid.ID{} },
		"hint twice":            func(s *cache.Snapshot) { s.SVIDs[0].Hint, s.SVIDs[1].Hint = "x", "x" },
		"second SVID broken":    func(s *cache.Snapshot) { s.SVIDs[1].Key = other.svid("/b", "").Key },
	}
	for name, spoil := range cases {
		snap := ca.snapshot(ca.svid("/a", ""), ca.svid("/b", ""))
		spoil(snap)
		for _, p := range []*profile{x509SVIDs, x509Bundles} {
			msg, err := p.encode(snap)
			if msg != nil || fault.ReasonOf(err) != "response_invalid" || fault.KindOf(err) != fault.NotReady {
				t.Errorf("%s: %s: %v", name, p.method, err)
			}
		}
	}
	snap := ca.snapshot(ca.svid("/a", "x"), ca.svid("/b", ""), ca.svid("/c", ""))
	if _, err := x509SVIDs.encode(snap); err != nil {
		t.Fatal(err)
	}
}

func TestOversizedAnswersAreNotSent(t *testing.T) { // WL-36
	ca := newAuthority(t)
	svid := ca.svid("/a", "")
	snap := ca.snapshot()
	for range 1000 {
		snap.SVIDs = append(snap.SVIDs, svid)
	}
	for len(snap.BundleDER) < 5<<10 {
		snap.BundleDER = append(snap.BundleDER, ca.root.Raw...)
	}
	e := serve(t, &source{snap: snap}, withTiming(func(w *timing) { w.hold = time.Millisecond }))
	wantStatus(t, call(withHeader(t), e.conn(), fetchSVID), codes.Unavailable, "response_too_large")
	if err := call(withHeader(t), e.conn(), fetchBundles); err != nil {
		t.Fatal(err)
	}
}

func TestSnapshotIsEncodedOnce(t *testing.T) {
	ca := newAuthority(t)
	snap := ca.snapshot(ca.svid("/a", ""))
	one, err := x509SVIDs.encode(snap)
	if err != nil {
		t.Fatal(err)
	}
	if two, _ := x509SVIDs.encode(snap); two != one {
		t.Fatal("encoded again")
	}
	if bundles, _ := x509Bundles.encode(snap); bundles == one {
		t.Fatal("profiles mixed up")
	}
}
