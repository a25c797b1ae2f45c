package ca

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestMetricsFollowTheAuthorities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		reg := prometheus.NewPedanticRegistry()
		w.opts.Registerer = reg
		a := w.open()
		start(t, a)
		issue(t, a, workload("/w"))
		issue(t, a, agentRequest())
		issue(t, a, agentRequest())
		first := a.Bundle().Roots[0].ID
		check := func(names []string, want string) {
			t.Helper()
			if err := testutil.GatherAndCompare(reg, strings.NewReader(want), names...); err != nil {
				t.Error(err)
			}
		}
		check([]string{"assay_x509_svids_signed_total", "assay_bundle_sequence", "assay_authority_not_after_timestamp_seconds", "assay_issuer_not_after_timestamp_seconds"}, fmt.Sprintf(`
# HELP assay_authority_not_after_timestamp_seconds End of an authority in the bundle.
# TYPE assay_authority_not_after_timestamp_seconds gauge
assay_authority_not_after_timestamp_seconds{authority=%q,trust_domain="example.org",use="x509"} 9.78220800e+08
# HELP assay_bundle_sequence Sequence number of the trust bundle.
# TYPE assay_bundle_sequence gauge
assay_bundle_sequence 1
# HELP assay_issuer_not_after_timestamp_seconds End of this server's issuer.
# TYPE assay_issuer_not_after_timestamp_seconds gauge
assay_issuer_not_after_timestamp_seconds{issuer=%q,trust_domain="example.org"} 9.467712e+08
# HELP assay_x509_svids_signed_total X.509-SVIDs signed, by kind.
# TYPE assay_x509_svids_signed_total counter
assay_x509_svids_signed_total{kind="agent"} 2
assay_x509_svids_signed_total{kind="mesh"} 0
assay_x509_svids_signed_total{kind="minted"} 0
assay_x509_svids_signed_total{kind="server"} 0
assay_x509_svids_signed_total{kind="workload"} 1
`, first, a.Issuer().ID))
		next, err := a.makeRoot(t.Context(), Prepared)
		if err != nil {
			t.Fatal(err)
		}
		w.change(a, nil, next)
		synctest.Wait()
		if n, err := testutil.GatherAndCount(reg, "assay_authority_state"); err != nil || n != 10 {
			t.Errorf("%d series of states for two roots, error %v", n, err)
		}
		w.change(a, map[string]State{first: Retired, next.record.ID: Active})
		synctest.Wait()
		w.change(a, map[string]State{first: Revoked})
		synctest.Wait()
		check([]string{"assay_authority_state"}, strings.ReplaceAll(`
# HELP assay_authority_state 1 for the state that an authority in the bundle is in, else 0.
# TYPE assay_authority_state gauge
assay_authority_state{authority="ID",state="active",trust_domain="example.org",use="x509"} 1
assay_authority_state{authority="ID",state="prepared",trust_domain="example.org",use="x509"} 0
assay_authority_state{authority="ID",state="retired",trust_domain="example.org",use="x509"} 0
assay_authority_state{authority="ID",state="revoked",trust_domain="example.org",use="x509"} 0
assay_authority_state{authority="ID",state="tainted",trust_domain="example.org",use="x509"} 0
`, "ID", next.record.ID))
		if _, err := Open(t.Context(), w.opts); err == nil {
			t.Error("one registry took the metrics twice")
		}
	})
}
