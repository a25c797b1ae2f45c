package state_test

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

func TestBundleFromAServer(t *testing.T) { // BUN-22
	a := root()
	good := &agentv1.TrustBundle{TrustDomain: td.Name(), Sequence: 7, X509Authorities: []*agentv1.Authority{
		{Id: a.ID, Certificate: a.Certificate.Raw, Tainted: true},
	}}
	b, err := state.BundleFrom(td, good)
	if err != nil || b.Sequence != 7 || !b.Authenticated || len(b.Authorities) != 1 || b.Authorities[0].ID != a.ID || !b.Authorities[0].Tainted {
		t.Fatalf("%+v, %v", b, err)
	}
	for name, spoil := range map[string]func(*agentv1.TrustBundle){
		"another trust domain": func(b *agentv1.TrustBundle) { b.TrustDomain = "example.com" },
		"no roots":             func(b *agentv1.TrustBundle) { b.X509Authorities = nil },
		"no certificate":       func(b *agentv1.TrustBundle) { b.X509Authorities[0].Certificate = []byte("x") },
		"another's ID":         func(b *agentv1.TrustBundle) { b.X509Authorities[0].Id = "00" },
		"the same root twice":  func(b *agentv1.TrustBundle) { b.X509Authorities = append(b.X509Authorities, b.X509Authorities[0]) },
	} {
		bad := proto.CloneOf(good)
		spoil(bad)
		if _, err := state.BundleFrom(td, bad); fault.ReasonOf(err) != "bundle_invalid" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := state.BundleFrom(td, nil); fault.ReasonOf(err) != "bundle_invalid" {
		t.Errorf("none: %v", err)
	}
}

// I9: a bundle that the next start could not read, or that leaves no room for
// SVIDs in an answer of the Workload API, is not taken.
func TestBundlesHaveABound(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	s := open(t, dir)
	defer func() { _ = s.Close() }()
	// Without a subject key identifier the server may name it as it likes.
	nameless := certificate(newKey(), true, td.ID(), pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 14}, Value: []byte{4, 0}})
	if len(nameless.SubjectKeyId) > 0 {
		t.Fatal("the certificate names its key")
	}
	wire := func(roots ...*agentv1.Authority) *agentv1.TrustBundle {
		return &agentv1.TrustBundle{TrustDomain: td.Name(), Sequence: 1, X509Authorities: roots}
	}
	var many []*agentv1.Authority
	for range 200 {
		a := root()
		many = append(many, &agentv1.Authority{Id: a.ID, Certificate: a.Certificate.Raw})
	}
	large := certificate(newKey(), true, td.ID(), pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: make([]byte, 300<<10)})
	for name, bad := range map[string]*agentv1.TrustBundle{
		"a long ID":   wire(&agentv1.Authority{Id: strings.Repeat("<", 5<<20), Certificate: nameless.Raw}),
		"many roots":  wire(many...),
		"a long root": wire(&agentv1.Authority{Certificate: large.Raw}),
	} {
		if _, err := state.BundleFrom(td, bad); fault.ReasonOf(err) != "bundle_invalid" {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What passes can be read again.
	b := must(state.BundleFrom(td, wire(append(many[:100:100], &agentv1.Authority{Id: strings.Repeat("<", 128<<10), Certificate: nameless.Raw})...)))
	if err := s.SaveBundle(b); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s, dir)
	if got, ok := s.Bundle(); !ok || !got.Equal(b) {
		t.Error("another bundle after the restart")
	}
}

// What could not be read again is not written.
func TestNoFileIsLargerThanWhatIsRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	s := open(t, dir)
	defer func() { _ = s.Close() }()
	list := []state.Delivered{{Sequence: 1, AuthorityID: "a", Until: time.Unix(1, 0)}}
	if err := s.SaveDelivered(list); err != nil {
		t.Fatal(err)
	}
	err := s.SaveDelivered([]state.Delivered{{Sequence: 1, AuthorityID: strings.Repeat("a", 5<<20)}})
	wantReason(t, err, "state_too_large")
	s = reopen(t, s, dir)
	if got := s.Delivered(); len(got) != 1 || got[0].AuthorityID != "a" {
		t.Errorf("%d deliveries after the restart", len(got))
	}
}
