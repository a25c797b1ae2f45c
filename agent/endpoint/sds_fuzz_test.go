package endpoint

import (
	"slices"
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// current stands for the nonce of the last response in fuzzed requests.
const current = "N"

// FuzzSecretRequests feeds a stream with what clients may send, one request
// after the other, between changes of what the caller may have: it never panics,
// answers with what the caller may have and nothing else, under the names that
// were asked for, and sends nothing twice in a row. // SDS-07, SDS-05
func FuzzSecretRequests(f *testing.F) {
	ca := newAuthority(f)
	a, b := ca.svid("/a", ""), ca.svid("/b", "")
	states := []*cache.Snapshot{ca.snapshot(a, b), ca.snapshot(b), ca.snapshot(ca.svid("/a", ""), b)}
	bundles := []string{"ROOTCA", "ALL", "spiffe://example.org"}

	conversation := func(requests ...*discoveryv3.DiscoveryRequest) []byte {
		var data []byte
		for _, req := range requests {
			one, err := proto.Marshal(req)
			if err != nil {
				f.Fatal(err)
			}
			data = protowire.AppendBytes(data, one)
		}
		return data
	}
	f.Add(conversation(
		&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}, TypeUrl: secretType},
		&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}, ResponseNonce: current},
		&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}, ResponseNonce: current},
		&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}, ResponseNonce: current, ErrorDetail: &rpcstatus.Status{Message: "x"}},
	))
	f.Add(conversation(&discoveryv3.DiscoveryRequest{}, &discoveryv3.DiscoveryRequest{ResponseNonce: "old", ResourceNames: []string{"x"}}))
	f.Add(conversation(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"spiffe://example.org/a", "ALL", "spiffe://example.org"}}))
	f.Add(conversation(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"file-root:system"}}))

	f.Fuzz(func(t *testing.T, data []byte) {
		config, d := SDSConfig{}.WithDefaults(), &dialogue{}
		version, nonces, verdicts := "", 0, 0
		var served []string
		for turn := 0; len(data) > 0; turn++ {
			one, n := protowire.ConsumeBytes(data)
			if n < 0 {
				return
			}
			data = data[n:]
			req := &discoveryv3.DiscoveryRequest{}
			if proto.Unmarshal(one, req) != nil {
				return
			}
			if req.GetResponseNonce() == current {
				req.ResponseNonce = d.nonce
			}
			verdict, _, err := d.hear(req)
			if err != nil {
				if fault.KindOf(err) != fault.Invalid {
					t.Fatal(err)
				}
				return
			}
			if verdict != silent {
				verdicts++
			}
			if verdicts > nonces {
				t.Fatalf("%d verdicts on %d responses", verdicts, nonces)
			}
			if !d.asked {
				continue
			}
			snap := states[turn%len(states)]
			resp, missing, err := config.compose(snap, d.names, d.plain)
			if err != nil {
				if fault.KindOf(err) != fault.Invalid || !slices.Contains(d.names, missing) {
					t.Fatalf("%v, missing %q of %q", err, missing, d.names)
				}
				return
			}
			checkResponse(t, resp, snap, d, bundles)
			if resp.GetVersionInfo() != version || !slices.Equal(served, d.names) {
				version, served = resp.GetVersionInfo(), d.names
				nonces++
				d.said("nonce " + string(rune('a'+nonces%26)))
			}
		}
	})
}

// checkResponse holds a response to what was asked for and to what a snapshot
// has.
func checkResponse(t *testing.T, resp *discoveryv3.DiscoveryResponse, snap *cache.Snapshot, d *dialogue, bundles []string) {
	t.Helper()
	if len(d.names) > 0 && len(resp.GetResources()) != len(d.names) {
		t.Fatalf("%d resources for %q", len(resp.GetResources()), d.names)
	}
	certificates := false
	for _, r := range resp.GetResources() {
		s := &tlsv3.Secret{}
		if err := r.UnmarshalTo(s); err != nil {
			t.Fatal(err)
		}
		if len(d.names) > 0 && !slices.Contains(d.names, s.GetName()) {
			t.Fatalf("%q was not asked for: %q", s.GetName(), d.names)
		}
		if s.GetTlsCertificate() == nil {
			if certificates || !slices.Contains(bundles, s.GetName()) {
				t.Fatalf("bundle %q, behind certificates: %v", s.GetName(), certificates)
			}
			continue
		}
		certificates = true
		id := s.GetName()
		if id == "default" {
			id = snap.SVIDs[0].ID.String()
		}
		leaf := keyPair(t, s).Leaf
		if leaf.URIs[0].String() != id || !slices.ContainsFunc(snap.SVIDs, func(svid *cache.SVID) bool { return svid.ID.String() == id }) {
			t.Fatalf("%q is of %v", s.GetName(), leaf.URIs)
		}
	}
}
