package state_test

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

func TestBundleFromAServer(t *testing.T) {
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
