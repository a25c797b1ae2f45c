package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

func rootWithKey(t *testing.T, key any, pub any) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: longAgo, NotAfter: farAway,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func manyRoots(t *testing.T) []*x509.Certificate {
	t.Helper()
	var roots []*x509.Certificate
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, rootWithKey(t, key, key.Public()))
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return append(roots, rootWithKey(t, key, key.Public()))
}

// serverWithRoots is a server whose bundle has these roots.
func serverWithRoots(t *testing.T, roots []*x509.Certificate) map[string]string {
	t.Helper()
	f := populated(newPKI(t))
	f.bundle.X509Authorities = nil
	for _, r := range roots {
		f.bundle.X509Authorities = append(f.bundle.X509Authorities, &types.X509Certificate{Asn1: r.Raw})
	}
	f.bundle.SequenceNumber = 1<<63 + 5 // more than a float64 holds
	return map[string]string{serverSocketEnv: f.start(t)}
}

// BUN-1, BUN-3, BUN-5, BUN-6, BUN-12, BUN-13, BUN-14, BUN-15, BUN-16, BUN-17,
// BUN-18, BUN-26, D-7: the SPIFFE form, member by member and by another reader.
func TestSPIFFEBundleHasExactlyTheMembersOfTheStandard(t *testing.T) {
	roots := manyRoots(t)
	got := assay(t, serverWithRoots(t, roots), "bundle", "show", "--format", "spiffe")
	if got.code != 0 {
		t.Fatal(got.stderr)
	}
	var doc map[string]json.RawMessage
	if err := json.Unmarshal([]byte(got.stdout), &doc); err != nil {
		t.Fatal(err)
	}
	if string(doc["spiffe_sequence"]) != "9223372036854775813" || string(doc["spiffe_refresh_hint"]) != "300" || len(doc) != 3 {
		t.Errorf("members: %s", got.stdout)
	}
	var keys []map[string]any
	if err := json.Unmarshal(doc["keys"], &keys); err != nil {
		t.Fatal(err)
	}
	allowed := map[string][]string{"EC": {"crv", "kty", "use", "x", "x5c", "y"}, "RSA": {"e", "kty", "n", "use", "x5c"}}
	if len(keys) != len(roots) {
		t.Fatalf("%d keys for %d roots", len(keys), len(roots))
	}
	for i, key := range keys {
		var names []string
		for name := range key {
			names = append(names, name)
		}
		slices.Sort(names)
		if want := allowed[fmt.Sprint(key["kty"])]; key["use"] != "x509-svid" || !slices.Equal(names, want) {
			t.Errorf("key %d: %v", i, key)
		}
		if x5c := key["x5c"].([]any); len(x5c) != 1 || x5c[0] != base64.StdEncoding.EncodeToString(roots[i].Raw) {
			t.Errorf("key %d: x5c %v", i, x5c)
		}
	}
	// go-jose, inside go-spiffe, compares the key parameters with the certificate.
	parsed, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("example.org"), []byte(got.stdout))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(parsed.X509Authorities()); n != len(roots) {
		t.Errorf("go-spiffe reads %d roots", n)
	}
	if seq, ok := parsed.SequenceNumber(); !ok || seq != 1<<63+5 {
		t.Errorf("go-spiffe reads sequence %d", seq)
	}
}

// BUN-8: an empty bundle has an empty array.
func TestEmptySPIFFEBundleHasAnArrayOfKeys(t *testing.T) {
	got := assay(t, serverWithRoots(t, nil), "bundle", "show", "--format", "spiffe")
	if got.code != 0 || !strings.HasPrefix(got.stdout, `{"keys":[],`) {
		t.Errorf("exit %d, %s", got.code, got.stdout)
	}
	if got := assay(t, serverWithRoots(t, nil), "bundle", "show", "-o", "json"); !strings.Contains(got.stdout, `"x509_authorities":[]`) {
		t.Error(got.stdout)
	}
}

func TestBundleAsPEMAndJSON(t *testing.T) {
	roots := manyRoots(t)
	vars := serverWithRoots(t, roots)
	got := assay(t, vars, "bundle", "show")
	parsed, err := parseBundle([]byte(got.stdout))
	if err != nil || len(parsed) != len(roots) || got.code != 0 {
		t.Errorf("exit %d, %d roots, %v", got.code, len(parsed), err)
	}
	var doc bundleShape
	if err := json.Unmarshal([]byte(assay(t, vars, "bundle", "show", "-o", "json").stdout), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Sequence != 1<<63+5 || len(doc.X509Authorities) != len(roots) || doc.X509Authorities[0].NotAfter != farAway {
		t.Errorf("%+v", doc)
	}
	// With both asked for, the SPIFFE form is JSON already.
	both := assay(t, vars, "bundle", "show", "-o", "json", "--format", "spiffe")
	if !strings.HasPrefix(both.stdout, `{"keys":[{`) {
		t.Error(both.stdout)
	}
}

func TestBundleWithABrokenRootIsNotShown(t *testing.T) {
	f := populated(newPKI(t))
	f.bundle.X509Authorities = append(f.bundle.X509Authorities, &types.X509Certificate{Asn1: []byte("no certificate")})
	got := assay(t, map[string]string{serverSocketEnv: f.start(t)}, "bundle", "show")
	if got.code != 70 || got.stdout != "" {
		t.Errorf("exit %d, %q", got.code, got.stdout)
	}
}

// BUN-2, BUN-9, BUN-10, BUN-11, BUN-19, BUN-20, BUN-21, D-6: what a reader of bundles keeps
// and what it passes over.
func TestBundleReaderJudgesEachElementAlone(t *testing.T) {
	p := newPKI(t)
	other := newPKI(t)
	x5c := func(r *x509.Certificate) string { return `"` + base64.StdEncoding.EncodeToString(r.Raw) + `"` }
	good := `{"use":"x509-svid","kty":"EC","x5c":[` + x5c(p.root) + `]}`
	cases := map[string]struct {
		keys string
		want int
	}{
		"one":                     {good, 1},
		"future key type":         {good + `,{"use":"x509-svid","kty":"FUTURE","x5c":[` + x5c(other.root) + `]}`, 1},
		"no use":                  {good + `,{"kty":"EC","x5c":[` + x5c(other.root) + `]}`, 1},
		"unknown use":             {good + `,{"use":"X509-SVID","kty":"EC","x5c":[` + x5c(other.root) + `]}`, 1},
		"JWT key":                 {good + `,{"use":"jwt-svid","kty":"EC","kid":"a"}`, 1},
		"no certificate":          {good + `,{"use":"x509-svid","kty":"EC"}`, 1},
		"empty x5c":               {good + `,{"use":"x509-svid","kty":"EC","x5c":[]}`, 1},
		"x5c of another type":     {good + `,{"use":"x509-svid","kty":"EC","x5c":7}`, 1},
		"not base64":              {good + `,{"use":"x509-svid","kty":"EC","x5c":["-"]}`, 1},
		"no object":               {good + `,7`, 1},
		"second x5c is passed by": {`{"use":"x509-svid","kty":"EC","x5c":[` + x5c(p.root) + `,` + x5c(other.root) + `]}`, 1},
		"two":                     {good + `,{"use":"x509-svid","kty":"EC","x5c":[` + x5c(other.root) + `]}`, 2},
		"only JWT keys":           {`{"use":"jwt-svid","kty":"EC","kid":"a"}`, 0},
		"nothing":                 {``, 0},
	}
	for name, c := range cases {
		roots, err := parseBundle([]byte(` {"keys":[` + c.keys + `],"x-foo":{}}`))
		if len(roots) != c.want || (err != nil) != (c.want == 0) {
			t.Errorf("%s: %d roots, %v", name, len(roots), err)
		}
		if c.want > 0 && !bytes.Equal(roots[0].Raw, p.root.Raw) {
			t.Errorf("%s: another root", name)
		}
	}
	for _, text := range []string{`{}`, `{"keys":null}`, `{"keys":7}`, `{"keys":[`, ``, `[]`, `-----BEGIN CERTIFICATE-----`} {
		if roots, err := parseBundle([]byte(text)); err == nil {
			t.Errorf("%q gives %d roots", text, len(roots))
		}
	}
}

func FuzzParseBundle(f *testing.F) {
	p := newPKI(f)
	f.Add(certificatesPEM([]*x509.Certificate{p.root}))
	doc, err := newJWKSet([]*x509.Certificate{p.root}, 1, 1)
	if err != nil {
		f.Fatal(err)
	}
	text, err := json.Marshal(doc)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"keys":[{"use":"x509-svid","kty":"EC","x5c":["AA=="]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		roots, err := parseBundle(data)
		if (err == nil) != (len(roots) > 0) {
			t.Fatalf("%d roots, %v", len(roots), err)
		}
		if err != nil {
			return
		}
		again, err := parseBundle(certificatesPEM(roots))
		if err != nil || len(again) != len(roots) {
			t.Fatalf("%d roots, again %d, %v", len(roots), len(again), err)
		}
	})
}

func FuzzParsePEM(f *testing.F) {
	p := newPKI(f)
	f.Add(certificatesPEM([]*x509.Certificate{p.root, p.root}))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		certs, err := parsePEM(data)
		if err != nil && certs != nil {
			t.Fatal("certificates beside an error")
		}
	})
}

func TestVerifyAcceptsAGoodSVID(t *testing.T) {
	p := newPKI(t)
	leaf, _ := p.leaf("spiffe://example.org/web", nil)
	svid, pemBundle := writePEM(t, "svid.pem", leaf), writePEM(t, "bundle.pem", newPKI(t).root, p.root)
	doc, err := newJWKSet([]*x509.Certificate{p.root}, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	jwks := t.TempDir() + "/bundle.json"
	if err := os.WriteFile(jwks, text, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bundle := range []string{pemBundle, jwks} {
		got := assay(t, nil, "svid", "verify", "--svid", svid, "--bundle", bundle, "--id", "spiffe://example.org/web")
		if got.code != 0 || got.stderr != "" {
			t.Fatalf("exit %d, %s", got.code, got.stderr)
		}
		golden(t, "svid_verify.txt", got.stdout)
	}
	golden(t, "svid_verify.json", assay(t, nil, "svid", "verify", "--svid", svid, "--bundle", pemBundle, "-o", "json").stdout)
}

// ID-23, X509-2, X509-5, X509-12, X509-22, X509-27, X509-33: each broken rule ends
// with 65 and a reason. The rules themselves are tested where they live.
func TestVerifyRefusesABadSVID(t *testing.T) {
	p, stranger := newPKI(t), newPKI(t)
	const web = "spiffe://example.org/web"
	make1 := func(id string, change func(*x509.Certificate)) string {
		leaf, _ := p.leaf(id, change)
		return writePEM(t, "svid.pem", leaf)
	}
	good := make1(web, nil)
	bundle := writePEM(t, "bundle.pem", p.root)
	garbage := t.TempDir() + "/garbage"
	if err := os.WriteFile(garbage, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := t.TempDir() + "/empty"
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Documents of other kinds, whatever they say about who somebody is.
	other := func(text string) string {
		file := t.TempDir() + "/other"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	leaf, _ := p.leaf(web, nil)
	mixed := writePEM(t, "mixed.pem", p.root, leaf)
	unusable, _ := p.leaf("spiffe://example.org", func(c *x509.Certificate) { c.IsCA = true })
	idle := writePEM(t, "idle.pem", unusable)
	cases := map[string]struct {
		svid, bundle, id, reason string
		code                     int
	}{
		"expired":           {make1(web, func(c *x509.Certificate) { c.NotAfter = longAgo.AddDate(0, 1, 0) }), bundle, "", "svid_expired", 65},
		"not yet valid":     {make1(web, func(c *x509.Certificate) { c.NotBefore = farAway.AddDate(0, -1, 0) }), bundle, "", "svid_invalid", 65},
		"two URIs":          {make1(web, func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), bundle, "", "svid_invalid", 65},
		"no URI":            {make1(web, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"web"} }), bundle, "", "svid_invalid", 65},
		"no path":           {make1("spiffe://example.org", nil), bundle, "", "svid_invalid", 65},
		"signing usage":     {make1(web, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), bundle, "", "svid_invalid", 65},
		"one purpose":       {make1(web, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), bundle, "", "svid_invalid", 65},
		"no signature":      {make1(web, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), bundle, "", "svid_invalid", 65},
		"another root":      {good, writePEM(t, "bundle.pem", stranger.root), "", "svid_invalid", 65},
		"leaf as bundle":    {good, good, "", "bundle_invalid", 65},
		"arguments swapped": {bundle, good, "", "bundle_invalid", 65},
		"leaf among roots":  {good, mixed, "", "bundle_invalid", 65},
		"CA without usage":  {good, idle, "", "bundle_invalid", 65},
		"a root as leaf":    {bundle, bundle, "", "svid_invalid", 65},
		"another ID":        {good, bundle, "spiffe://example.org/db", "svid_id_mismatch", 65},
		"a public key":      {other(string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: leaf.RawSubjectPublicKeyInfo}))), bundle, "", "file_malformed", 65},
		"an SSH key":        {other("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGYtDmM5 spiffe://example.org/web\n"), bundle, "", "file_malformed", 65},
		"a JWT":             {other("eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy93ZWIifQ.c2ln\n"), bundle, "", "file_malformed", 65},
		"broken file":       {garbage, bundle, "", "file_malformed", 65},
		"empty file":        {empty, bundle, "", "file_malformed", 65},
		"broken bundle":     {good, garbage, "", "file_malformed", 65},
		"empty bundle":      {good, empty, "", "file_malformed", 65},
		"no file":           {good + ".none", bundle, "", "file_missing", 69},
		"directory as file": {t.TempDir(), bundle, "", "internal", 70},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			args := []string{"svid", "verify", "--svid", c.svid, "--bundle", c.bundle}
			if c.id != "" {
				args = append(args, "--id", c.id)
			}
			got := assay(t, nil, args...)
			if got.code != c.code || got.stdout != "" || !strings.HasPrefix(got.stderr, "error: "+c.reason+": ") {
				t.Errorf("exit %d, %q%q", got.code, got.stdout, got.stderr)
			}
		})
	}
}
