//go:build e2e && long

package e2e

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/test/harness"
)

const (
	outageLife = 30 * time.Second
	outageTTL  = `ca:
  x509_svid_ttl: 30s
  max_x509_svid_ttl: 30s
  backdate: 1s
attestation:
  agent_svid_ttl: 30s
`
)

// outage is an agent whose server is away from before 0.4 of the life of leaf on,
// and which is killed and started again at 0.6.
type outage struct {
	t    *testing.T
	site *harness.Site
	a    *harness.Agent
	leaf *x509.Certificate
}

func newOutage(t *testing.T) *outage {
	t.Helper()
	o := &outage{t: t, site: newSite(t, outageTTL)}
	o.site.StartServer()
	o.a = o.site.NewAgent("agent")
	o.a.Start(o.a.Join())
	o.site.CreateEntry(o.a.ID, "spiffe://example.org/w")
	if _, err := fetch(t, o.a, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	o.site.Server.Stop(syscall.SIGKILL)
	var err error
	if o.leaf, err = o.fetch(); err != nil {
		t.Fatal(err)
	}
	o.at(0.6)
	o.a.Stop(syscall.SIGKILL)
	o.a.Launch(harness.Token{})
	o.a.Eventually(20*time.Second, "the SVID from before", func() error {
		_, err := o.fetch()
		return err
	})
	return o
}

// at waits until this part of the life of the certificate is over.
func (o *outage) at(part float64) {
	issued := o.leaf.NotAfter.Add(-outageLife)
	<-time.After(time.Until(issued.Add(time.Duration(part * float64(outageLife)))))
}

func (o *outage) fetch() (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(o.t.Context(), 15*time.Second)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(o.a.Endpoint()))
	if err != nil {
		return nil, err
	}
	return svid.Certificates[0], nil
}

// holds fetches until the certificate has so little left: it is always the same.
func (o *outage) holds(left time.Duration) {
	o.t.Helper()
	for time.Until(o.leaf.NotAfter) > left {
		got, err := o.fetch()
		if err != nil || !got.Equal(o.leaf) {
			if time.Now().Before(o.leaf.NotAfter) {
				o.t.Fatalf("%v before its end: %v", time.Until(o.leaf.NotAfter), err)
			}
			return
		}
		<-time.After(100 * time.Millisecond)
	}
}

// recovers waits for another certificate, from the process that is there.
func (o *outage) recovers() {
	o.t.Helper()
	o.site.StartServer()
	o.a.Eventually(time.Minute, "a new SVID", func() error {
		got, err := o.fetch()
		if err == nil && got.Equal(o.leaf) {
			err = errors.New("the old one")
		}
		return err
	})
}

// A server that is away from 0.4 of a certificate's life on, an agent that is killed
// meanwhile: the workload is served to the end of the certificate, told why it is
// not from then on, and served again without anybody's help. // NEG-59
func TestServesAsLongAsTheCertificateLives(t *testing.T) {
	t.Run("the server is back just in time", func(t *testing.T) {
		t.Parallel()
		o := newOutage(t)
		o.holds(outageLife / 20)
		o.recovers()
	})
	t.Run("the server is back too late", func(t *testing.T) {
		t.Parallel()
		o := newOutage(t)
		o.holds(0)
		o.a.Eventually(20*time.Second, "the refusal", func() error {
			_, err := o.fetch()
			if status.Code(err) != codes.Unavailable || !strings.Contains(fmt.Sprint(status.Convert(err).Details()), "svid_expired_server_unreachable") {
				return fmt.Errorf("got %w %v", err, status.Convert(err).Details())
			}
			return nil
		})
		o.at(1.2)
		o.recovers()
	})
}
