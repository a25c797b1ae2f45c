//go:build kube

package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/seed-caa81108/assay/test/harness"
)

// istiodRules are the rights that istiod_secret needs besides serverRules.
var istiodRules = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{"istiod-tls"}, Verbs: []string{"get", "update"}},
}

// makeSecret makes istiod's Secret as the chart does, or as who has another tool.
func (s *Space) makeSecret(t testing.TB, kind corev1.SecretType, data map[string][]byte) {
	t.Helper()
	if _, err := s.Core.Secrets(s.Namespace).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "istiod-tls"}, Type: kind, Data: data,
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// noCertificate is good for the API server and for nobody else.
var noCertificate = map[string][]byte{"tls.crt": []byte("none"), "tls.key": []byte("none")}

// told waits until the server's log has what.
func told(t *testing.T, site *harness.Site, what string) {
	t.Helper()
	site.Server.Eventually(90*time.Second, what, func() error {
		if !strings.Contains(readFile(t, site.File("server.log")), what) {
			return errors.New("not yet")
		}
		return nil
	})
}

// control is istiod's Secret in a space.
type control struct {
	*Space
	t    *testing.T
	ctx  context.Context //nolint:containedctx // the test's
	site *harness.Site
}

// held is what is in the Secret, as istiod, a proxy and the API server's webhooks
// check it.
func (c *control) held() (*tls.Certificate, *corev1.Secret, error) {
	secret, err := c.Core.Secrets(c.Namespace).Get(c.ctx, "istiod-tls", metav1.GetOptions{})
	if err != nil {
		return nil, nil, err
	}
	pair, err := tls.X509KeyPair(secret.Data["tls.crt"], secret.Data["tls.key"])
	if err != nil {
		return nil, nil, err
	}
	roots, above := x509.NewCertPool(), x509.NewCertPool()
	if !roots.AppendCertsFromPEM(secret.Data["ca.crt"]) {
		return nil, nil, errors.New("ca.crt has no certificate")
	}
	for _, der := range pair.Certificate[1:] {
		issuer, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, err
		}
		above.AddCert(issuer)
	}
	for _, name := range []string{"istiod." + c.Namespace + ".svc", "istio-pilot." + c.Namespace + ".svc", "istiod-remote." + c.Namespace + ".svc"} {
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: above, DNSName: name}); err != nil {
			return nil, nil, err
		}
	}
	if want := "spiffe://example.org/ns/" + c.Namespace + "/sa/istiod"; len(pair.Leaf.URIs) != 1 || pair.Leaf.URIs[0].String() != want {
		return nil, nil, fmt.Errorf("its URIs are %v, want %s", pair.Leaf.URIs, want)
	}
	return &pair, secret, nil
}

// await waits until the Secret is as it should be.
func (c *control) await(what string, good func(*tls.Certificate, *corev1.Secret) error) (*tls.Certificate, *corev1.Secret) {
	c.t.Helper()
	var pair *tls.Certificate
	var secret *corev1.Secret
	began := time.Now()
	if err := poll(c.ctx, c.site.Server.Done(), func() (err error) {
		if pair, secret, err = c.held(); err == nil {
			err = good(pair, secret)
		}
		return err
	}); err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
	c.t.Logf("%s: after %v", what, time.Since(began).Round(time.Millisecond))
	return pair, secret
}

// other wants another certificate and another key.
func other(was *corev1.Secret) func(*tls.Certificate, *corev1.Secret) error {
	return func(_ *tls.Certificate, is *corev1.Secret) error {
		if bytes.Equal(was.Data["tls.crt"], is.Data["tls.crt"]) || bytes.Equal(was.Data["tls.key"], is.Data["tls.key"]) {
			return errors.New("the certificate or its key is the old one")
		}
		return nil
	}
}

// IS-02: istiod's Secret has a certificate with its names, which is renewed by
// itself, comes back when it is changed or made anew, and follows a rotation of the
// root.
func TestIstiodsSecretIsKept(t *testing.T) {
	s := cluster.NewSpace(t)
	s.makeSecret(t, corev1.SecretTypeOpaque, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	site := s.siteWith(t, append(slices.Clone(serverRules), istiodRules...),
		keeping(t, "istiod_secret: "+s.Namespace+"/istiod-tls")+"ca: {x509_svid_ttl: 40s, max_x509_svid_ttl: 40s}\nattestation: {agent_svid_ttl: 1m}\n")
	c := &control{Space: s, t: t, ctx: ctx, site: site}
	roots := func(n int) func(*tls.Certificate, *corev1.Secret) error {
		return func(_ *tls.Certificate, is *corev1.Secret) error {
			if got := bytes.Count(is.Data["ca.crt"], []byte("BEGIN")); got != n {
				return fmt.Errorf("there are %d roots, want %d", got, n)
			}
			return nil
		}
	}
	pair, first := c.await("at first", roots(1))
	if first.Type != corev1.SecretTypeOpaque || !bytes.HasPrefix(first.Data["tls.key"], []byte("-----BEGIN PRIVATE KEY-----")) || len(pair.Certificate) != 2 {
		t.Errorf("a Secret of type %s, with %d certificates", first.Type, len(pair.Certificate))
	}
	site.Server.Eventually(time.Minute, "the metric", func() error { // which follows the Secret
		if got := harness.Metric(t, site.Ops, `assay_istio_istiod_certificate_not_after_timestamp_seconds{cluster="test"}`); got != float64(pair.Leaf.NotAfter.Unix()) {
			return fmt.Errorf("it has %v, the certificate %v", got, pair.Leaf.NotAfter)
		}
		return nil
	})
	_, renewed := c.await("half of its life", other(first))

	secrets := s.Core.Secrets(s.Namespace)
	if err := secrets.Delete(ctx, "istiod-tls", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	told(t, site, "kubectl -n "+s.Namespace+" create secret generic istiod-tls")
	if got := harness.Metric(t, site.Ops, `assay_istio_istiod_certificate_not_after_timestamp_seconds{cluster="test"}`); got != 0 {
		t.Errorf("while there is no Secret the metric has %v", got)
	}
	s.makeSecret(t, corev1.SecretTypeTLS, noCertificate)
	_, again := c.await("made anew, of the other type", other(renewed))
	edit, err := json.Marshal(map[string]any{"data": map[string]any{"tls.key": first.Data["tls.key"], "more": []byte("kept")}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := secrets.Patch(ctx, "istiod-tls", types.MergePatchType, edit, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	_, mended := c.await("with another's key", other(again))
	if string(mended.Data["more"]) != "kept" {
		t.Error("what else was in the Secret is gone")
	}

	old := mended.Data["ca.crt"]
	site.CLI("root", "rotate", "--emergency", "--deadline", "1m", "--yes", "--detach", "--reason", "test")
	c.await("both roots", roots(2))
	c.await("another root signs", func(pair *tls.Certificate, _ *corev1.Secret) error {
		was := x509.NewCertPool()
		was.AppendCertsFromPEM(old)
		issuer, err := x509.ParseCertificate(pair.Certificate[1])
		if err != nil {
			return err
		}
		if _, err := issuer.Verify(x509.VerifyOptions{Roots: was, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
			return errors.New("the old root signs")
		}
		return nil
	})
	c.await("the old root is gone", roots(1))

	var lines int
	for raw := range strings.Lines(readFile(t, site.Audit())) {
		var line struct {
			Why    struct{ Rule string }
			Actor  struct{ Kind string }
			Target struct {
				ID string `json:"spiffe_id"`
			}
		}
		if err := json.Unmarshal([]byte(raw), &line); err != nil {
			t.Fatal(err)
		}
		if line.Why.Rule == "istio_istiod" {
			if lines++; line.Actor.Kind != "server" || line.Target.ID != "spiffe://example.org/ns/"+s.Namespace+"/sa/istiod" {
				t.Errorf("the audit log has %s", raw)
			}
		}
	}
	if lines < 6 {
		t.Errorf("the audit log has %d certificates of istiod's", lines)
	}
	for _, file := range []string{site.File("server.log"), site.Audit()} { // NEG-18
		for _, secret := range []*corev1.Secret{first, again, mended} {
			key := strings.Split(string(secret.Data["tls.key"]), "\n")[1]
			if text := readFile(t, file); strings.Contains(text, key) || strings.Contains(text, "PRIVATE KEY") {
				t.Errorf("a key is in %s", file)
			}
		}
	}
}

// A Secret that can't be what istiod needs is told of, and so is one that can't be
// changed.
func TestIstiodsSecretCannotBeKept(t *testing.T) {
	s := cluster.NewSpace(t)
	s.makeSecret(t, "example.org/other", nil)
	site := s.siteWith(t, append(slices.Clone(serverRules), istiodRules...), keeping(t, "istiod_secret: "+s.Namespace+"/istiod-tls"))
	told(t, site, "has another type than Opaque or kubernetes.io/tls")
	if got := harness.Metric(t, site.Ops, `assay_istio_istiod_certificate_not_after_timestamp_seconds{cluster="test"}`); got != 0 {
		t.Errorf("the metric has %v", got)
	}
	immutable := true
	if err := s.Core.Secrets(s.Namespace).Delete(t.Context(), "istiod-tls", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.makeSecret(t, corev1.SecretTypeOpaque, nil)
	c := &control{Space: s, t: t, ctx: t.Context(), site: site}
	site.Server.Eventually(time.Minute, "an immutable Secret that needs a change", func() error {
		_, held := c.await("made anew", func(*tls.Certificate, *corev1.Secret) error { return nil })
		held.Immutable, held.Data["ca.crt"] = &immutable, []byte("another's")
		_, err := s.Core.Secrets(s.Namespace).Update(t.Context(), held, metav1.UpdateOptions{}) // the server may be faster
		return err
	})
	told(t, site, "if it is immutable, delete it")
}
