package rotation_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/rotation"
)

// proxy is one of a mesh: it renews at half life, and knows of roots what came
// with its certificate.
type proxy struct {
	leaf, issuer *x509.Certificate
	roots        *x509.CertPool
	due          time.Time
}

func (p *proxy) renew(t *testing.T, s *site, name string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	svids, err := s.authority.IssueX509(t.Context(), audit.Origin{}, []ca.X509Request{{
		Kind: ca.Mesh, ID: spiffeid.RequireFromPath(td, "/ns/foo/sa/"+name), PublicKey: key.Public(),
	}})
	if err != nil || svids[0].Err != nil {
		t.Fatal(err, svids)
	}
	certs := make([]*x509.Certificate, 2)
	for i := range certs {
		if certs[i], err = x509.ParseCertificate(svids[0].Chain[i]); err != nil {
			t.Fatal(err)
		}
	}
	p.leaf, p.issuer, p.roots = certs[0], certs[1], s.authority.Bundle().Pool()
	p.due = time.Now().Add(time.Until(p.leaf.NotAfter) / 2)
}

// trusts says whether p takes what other shows.
func (p *proxy) trusts(other *proxy) error {
	above := x509.NewCertPool()
	above.AddCert(other.issuer)
	_, err := other.leaf.Verify(x509.VerifyOptions{Roots: p.roots, Intermediates: above, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}

// CA-19: the proxies of a mesh report to nobody, and learn of a root with their
// next certificate. A rotation waits until each has had one, so that there is no
// moment in which one of them does not take another's.
func TestARotationWaitsForTheProxiesOfAMesh(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a")
		proxies := make([]*proxy, 6)
		for i := range proxies {
			proxies[i] = &proxy{}
			proxies[i].renew(t, s, fmt.Sprint("p", i))
			time.Sleep(5 * time.Minute)
		}
		first, began := s.authority.Issuer().AuthorityID, time.Now()
		s.begin(0)
		phases := map[rotation.Phase]time.Duration{}
		for st := s.status(); st.Phase != rotation.Done; st = s.after(time.Minute) {
			if phases[st.Phase] == 0 {
				phases[st.Phase] = time.Since(began)
			}
			if time.Since(began) > 5*time.Hour {
				t.Fatalf("still %+v", st)
			}
			for i, p := range proxies {
				if !time.Now().Before(p.due) {
					p.renew(t, s, fmt.Sprint("p", i))
				}
			}
			synctest.Wait()
			for i, p := range proxies {
				for j, other := range proxies {
					if err := p.trusts(other); err != nil {
						t.Fatalf("after %v, %s: proxy %d does not take proxy %d: %v", time.Since(began), st.Phase, i, j, err)
					}
				}
			}
		}
		if s.state(first) != ca.Revoked {
			t.Errorf("the old root is %s", s.state(first))
		}
		// Nobody's last certificate from before the new root lives for longer than an
		// hour, and no mark stands more than ten minutes further.
		if waited := phases[rotation.Reissuing]; waited < 30*time.Minute || waited > 71*time.Minute {
			t.Errorf("the new root signed after %v", waited)
		}
		t.Logf("the new root signed after %v, the rotation took %v", phases[rotation.Reissuing], time.Since(began))
	})
}
