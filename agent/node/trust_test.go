package node

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func rootDER(t testing.TB, name string, ca bool) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: ca, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if ca {
		template.KeyUsage = x509.KeyUsageCertSign
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func names(t *testing.T, data string) (string, error) {
	t.Helper()
	b, err := parseTrustBundle([]byte(data), td)
	if err != nil {
		return "", err
	}
	var names []string
	for _, r := range b.Roots() {
		names = append(names, r.Subject.CommonName)
	}
	if b.Authenticated {
		t.Error("a file is no authenticated source")
	}
	if strings.Contains(data, "spiffe_sequence\":7") && b.Sequence != 7 {
		t.Errorf("sequence %d", b.Sequence)
	}
	return strings.Join(names, ","), nil
}

// BUN-2, BUN-5, BUN-8 to BUN-11, BUN-19 to BUN-21, D-6, PLAN-4: what go-spiffe's
// decoder refuses whole is decoded element by element here.
func TestSPIFFEBundleElements(t *testing.T) {
	x5c := func(ders ...[]byte) string {
		var list []string
		for _, der := range ders {
			list = append(list, `"`+base64.StdEncoding.EncodeToString(der)+`"`)
		}
		return "[" + strings.Join(list, ",") + "]"
	}
	a, b := rootDER(t, "a", true), rootDER(t, "b", true)
	good := `{"kty":"EC","use":"x509-svid","x5c":` + x5c(a) + `}`
	cases := []struct{ name, doc, want string }{
		{"one", `{"keys":[` + good + `]}`, "a"},
		{"BUN-2 extra members", `{"x-foo":{},"keys":[` + good + `],"spiffe_refresh_hint":60,"spiffe_sequence":7}`, "a"},
		{"BUN-5 large sequence", `{"spiffe_sequence":18446744073709551615,"keys":[` + good + `]}`, "a"},
		{"BUN-10 unknown kty", `{"keys":[{"kty":"FUTURE","use":"x509-svid","x5c":7},` + good + `]}`, "a"},
		{"BUN-10 no kty", `{"keys":[{"use":"x509-svid","x5c":` + x5c(b) + `},` + good + `]}`, "a"},
		{"BUN-10 unknown curve", `{"keys":[{"kty":"EC","crv":"P-000","use":"jwt-svid"},` + good + `]}`, "a"},
		{"BUN-11 unknown use", `{"keys":[{"kty":"EC","use":"foo-svid","x5c":` + x5c(b) + `},` + good + `]}`, "a"},
		{"BUN-11 no use", `{"keys":[{"kty":"EC","x5c":` + x5c(b) + `},` + good + `]}`, "a"},
		{"BUN-11 case of the value", `{"keys":[{"kty":"EC","use":"X509-SVID","x5c":` + x5c(b) + `},` + good + `]}`, "a"},
		{"BUN-11 case of the name", `{"keys":[{"kty":"EC","USE":"x509-svid","x5c":` + x5c(b) + `},` + good + `]}`, "a"},
		{"JWT keys are not roots", `{"keys":[{"kty":"EC","use":"jwt-svid","x5c":` + x5c(b) + `},` + good + `]}`, "a"},
		{"BUN-19 no x5c", `{"keys":[{"kty":"EC","use":"x509-svid"},` + good + `]}`, "a"},
		{"BUN-19 empty x5c", `{"keys":[{"kty":"EC","use":"x509-svid","x5c":[]},` + good + `]}`, "a"},
		{"BUN-20 several x5c", `{"keys":[{"kty":"EC","use":"x509-svid","x5c":` + x5c(a, b) + `}]}`, "a"},
		{"the same root twice", `{"keys":[` + good + `,` + good + `]}`, "a"},
		{"not an object", `{"keys":[7,null,"x",` + good + `]}`, "a"},

		{"BUN-8 keys missing", `{}`, ""},
		{"BUN-8 keys null", `{"keys":null}`, ""},
		{"BUN-8 keys no array", `{"keys":{}}`, ""},
		{"BUN-21 only JWT keys", `{"keys":[{"kty":"EC","use":"jwt-svid","kid":"a"}]}`, ""},
		{"BUN-9 nothing usable", `{"keys":[]}`, ""},
		{"BUN-5 negative sequence", `{"spiffe_sequence":-1,"keys":[` + good + `]}`, ""},
		{"BUN-5 fraction", `{"spiffe_sequence":1.0,"keys":[` + good + `]}`, ""},
		{"BUN-5 too large", `{"spiffe_sequence":18446744073709551616,"keys":[` + good + `]}`, ""},
		{"a leaf as root", `{"keys":[{"kty":"EC","use":"x509-svid","x5c":` + x5c(rootDER(t, "leaf", false)) + `}]}`, ""},
		{"bad base64", `{"keys":[{"kty":"EC","use":"x509-svid","x5c":["@@"]}]}`, ""},
		{"cut off", `{"keys":[` + good, ""},
	}
	for _, c := range cases {
		got, err := names(t, c.doc)
		if c.want == "" && err == nil {
			t.Errorf("%s: taken, roots %q", c.name, got)
		}
		if c.want != "" && (err != nil || got != c.want) {
			t.Errorf("%s: roots %q, %v", c.name, got, err)
		}
	}
}

func TestPEMBundle(t *testing.T) {
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	a, b := rootDER(t, "a", true), rootDER(t, "b", true)
	if got, err := names(t, "\n"+block("CERTIFICATE", a)+"\n\n"+block("CERTIFICATE", b)); err != nil || len(got) != 3 {
		t.Errorf("roots %q, %v", got, err)
	}
	for name, bad := range map[string]string{
		"empty":           "",
		"a key":           block("PRIVATE KEY", a),
		"a leaf":          block("CERTIFICATE", rootDER(t, "leaf", false)),
		"rubbish after":   block("CERTIFICATE", a) + "rubbish",
		"not DER":         block("CERTIFICATE", []byte("x")),
		"trailing in DER": block("CERTIFICATE", append(bytes.Clone(a), 0)),
	} {
		if got, err := names(t, bad); err == nil {
			t.Errorf("%s: taken, roots %q", name, got)
		}
	}
}

func FuzzTrustBundle(f *testing.F) {
	der := rootDER(f, "a", true)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	f.Add(fmt.Appendf(nil, `{"keys":[{"kty":"EC","use":"x509-svid","x5c":[%q]}],"spiffe_sequence":1}`, base64.StdEncoding.EncodeToString(der)))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := parseTrustBundle(data, td)
		if err != nil {
			return
		}
		// Whatever is trusted is a certificate that signs, and there is one.
		if len(b.Roots()) == 0 || b.Authenticated || b.TrustDomain != td {
			t.Fatalf("%+v", b)
		}
		for _, r := range b.Roots() {
			if !r.IsCA {
				t.Fatal("a leaf is trusted")
			}
		}
	})
}
