package attest_test

import (
	"context"
	"crypto"
	"crypto/dsa" //nolint:staticcheck // SA1019: a kind of key that must be refused
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/attest"
)

// One chain of three over a real TLS connection, with each kind of key.
func TestX509PopAttestsTheHolderOfACertificate(t *testing.T) {
	root := newNodeCA(t, "root")
	issuing := root.below(t, "issuing")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{
		"P-256": ecKey(t, elliptic.P256()), "P-384": ecKey(t, elliptic.P384()), "P-521": ecKey(t, elliptic.P521()), "RSA": rsaKey, "Ed25519": edKey,
	} {
		leaf := issuing.sign(t, template("node-1"), key.Public())
		mine, theirs := connect(t)
		certify := newKey(t, elliptic.P256())
		node := &holder{key: key, leaf: leaf.Raw, export: mine.ExportKeyingMaterial, certify: certify.Public()}
		records := &book{}
		pop := newPop([]*x509.Certificate{root.cert}, records)
		for range 2 { // as often as it likes
			got, err := pop.Attest(t.Context(), attest.Evidence{
				Payload: popPayload(t, leaf.Raw, issuing.cert.Raw), PublicKey: certify.Public(), Export: theirs.ExportKeyingMaterial,
			}, node.ask(t))
			sum := sha256.Sum256(leaf.RawTBSCertificate)
			want := "spiffe://example.org/assay/agent/x509pop/" + hex.EncodeToString(sum[:])
			if err != nil || got.AgentID.String() != want || !got.CanReattest {
				t.Fatalf("%s: %+v, %v", name, got, err)
			}
			if records.id != got.AgentID || records.attestor != "x509pop" || !slices.Equal(records.selectors, got.Selectors) {
				t.Errorf("%s: recorded %+v", name, records)
			}
		}
		if len(node.nonces) != 2 {
			t.Errorf("%s: the nonce was used again", name)
		}
	}
}

// The true reason of each refusal, and NEG-27 for what a node sends: whatever
// the shape, no panic, no challenge, no record, and the node is told the same.
func TestX509PopRefusesOtherChains(t *testing.T) {
	root, stranger := newNodeCA(t, "root"), newNodeCA(t, "root")
	issuing := root.below(t, "issuing")
	key := ecKey(t, elliptic.P256())
	// with signs a leaf after change.
	with := func(change func(*x509.Certificate)) []byte {
		c := template("node")
		change(c)
		return issuing.sign(t, c, key.Public()).Raw
	}
	by := func(public crypto.PublicKey) []byte { return issuing.sign(t, template("node"), public).Raw }
	good := with(func(*x509.Certificate) {})
	var many [][]byte
	for range 100 {
		many = append(many, issuing.cert.Raw)
	}
	deep, chain := issuing, [][]byte{}
	for _, name := range []string{"a", "b", "c", "d"} {
		deep = deep.below(t, name)
		chain = append([][]byte{deep.cert.Raw}, chain...)
	}
	unconstrained := caTemplate("narrow")
	unconstrained.PermittedDNSDomains = []string{"example.com"}
	narrowKey := ecKey(t, elliptic.P256())
	narrow := &nodeCA{cert: root.sign(t, unconstrained, narrowKey.Public()), key: narrowKey}
	named := template("node")
	named.DNSNames = []string{"node.example.net"}
	outside := narrow.sign(t, named, key.Public()).Raw
	noSign := caTemplate("no-sign")
	noSign.KeyUsage = x509.KeyUsageCRLSign
	noSignKey := ecKey(t, elliptic.P256())
	unable := &nodeCA{cert: root.sign(t, noSign, noSignKey.Public()), key: noSignKey}
	doubled := template("node")
	doubled.ExtraExtensions = slices.Repeat([]pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: []byte{5, 0}}}, 2)
	twice, err := x509.CreateCertificate(rand.Reader, doubled, issuing.cert, key.Public(), issuing.key)
	if err != nil {
		t.Fatal(err)
	}
	cases := map[string]struct {
		ders [][]byte
		why  string
	}{
		"nothing":      {nil, "chain_length"},
		"100 issuers":  {append([][]byte{good}, many...), "chain_length"},
		"five issuers": {append([][]byte{deep.sign(t, template("x"), key.Public()).Raw}, append(chain, issuing.cert.Raw)...), "chain_length"},
		"64 KB of names": {[][]byte{with(func(c *x509.Certificate) {
			c.DNSNames = slices.Repeat([]string{strings.Repeat("a", 60) + ".example"}, 1000)
		})}, "certificate_too_large"},
		"no DER":             {[][]byte{[]byte("-----BEGIN CERTIFICATE-----")}, "certificate_malformed"},
		"bytes behind it":    {[][]byte{append(slices.Clone(good), 0), issuing.cert.Raw}, "certificate_malformed"},
		"an extension twice": {[][]byte{twice, issuing.cert.Raw}, "certificate_malformed"},
		"an empty EKU": {[][]byte{with(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Value: []byte{0x30, 0}}}
		}), issuing.cert.Raw}, "certificate_malformed"},
		"a critical extension": {[][]byte{with(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}), issuing.cert.Raw}, "chain_untrusted"},
		"RSA of 1024 bits":            {[][]byte{by(rsaPublic(1024)), issuing.cert.Raw}, "key_not_allowed"},
		"RSA of 16384 bits":           {[][]byte{by(rsaPublic(16384)), issuing.cert.Raw}, "key_not_allowed"},
		"P-224":                       {[][]byte{by(ecKey(t, elliptic.P224()).Public()), issuing.cert.Raw}, "key_not_allowed"},
		"DSA":                         {[][]byte{swapKey(t, good, dsaSPKI(t)), issuing.cert.Raw}, "key_not_allowed"},
		"a key nobody knows":          {[][]byte{swapKey(t, good, unknownSPKI(t)), issuing.cert.Raw}, "key_not_allowed"},
		"an authority":                {[][]byte{issuing.cert.Raw}, "leaf_is_authority"},
		"a root of ours":              {[][]byte{root.cert.Raw}, "leaf_is_authority"},
		"an authority by usage":       {[][]byte{with(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), issuing.cert.Raw}, "leaf_is_authority"},
		"not for signatures":          {[][]byte{with(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), issuing.cert.Raw}, "leaf_usage"},
		"no usage":                    {[][]byte{with(func(c *x509.Certificate) { c.KeyUsage = 0 }), issuing.cert.Raw}, "leaf_usage"},
		"issuer missing":              {[][]byte{good}, "chain_untrusted"},
		"issuer not there but root":   {[][]byte{good, root.cert.Raw}, "chain_broken"},
		"wrong order":                 {[][]byte{good, root.cert.Raw, issuing.cert.Raw}, "chain_broken"},
		"a leaf as issuer":            {[][]byte{good, good}, "chain_broken"},
		"an issuer twice":             {[][]byte{good, issuing.cert.Raw, root.cert.Raw, root.cert.Raw}, "chain_broken"},
		"issuer that can't sign":      {[][]byte{unable.sign(t, template("node"), key.Public()).Raw, unable.cert.Raw}, "chain_broken"},
		"a root of the same name":     {[][]byte{stranger.sign(t, template("node"), key.Public()).Raw}, "chain_untrusted"},
		"that root sent along":        {[][]byte{stranger.sign(t, template("node"), key.Public()).Raw, stranger.cert.Raw}, "chain_untrusted"},
		"a false signature":           {[][]byte{resigned(t, parse(t, good), otherSignature(t, issuing.cert.Signature)), issuing.cert.Raw}, "chain_untrusted"},
		"outside the name constraint": {[][]byte{outside, narrow.cert.Raw}, "chain_untrusted"},
		"expired":                     {[][]byte{with(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), issuing.cert.Raw}, "certificate_expired"},
		"not yet valid":               {[][]byte{with(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), issuing.cert.Raw}, "certificate_expired"},
		"two common names":            {[][]byte{with(func(c *x509.Certificate) { c.RawSubject = twoNames(t) }), issuing.cert.Raw}, "name_ambiguous"}, // NEG-17
		"a control character":         {[][]byte{with(func(c *x509.Certificate) { c.Subject.CommonName = "a\nb" }), issuing.cert.Raw}, "name_not_allowed"},
		"a long name":                 {[][]byte{with(func(c *x509.Certificate) { c.Subject.CommonName = strings.Repeat("n", 1100) }), issuing.cert.Raw}, "name_not_allowed"},
		"a URI with no key":           {[][]byte{with(func(c *x509.Certificate) { c.URIs = uris("x509pop://example.org/plain") }), issuing.cert.Raw}, "name_not_allowed"},
		"a URI with an escape":        {[][]byte{with(func(c *x509.Certificate) { c.URIs = uris("x509pop://example.org/a:b%2e") }), issuing.cert.Raw}, "name_not_allowed"},
		"a URI with a query":          {[][]byte{with(func(c *x509.Certificate) { c.URIs = uris("x509pop://example.org/a:b?c") }), issuing.cert.Raw}, "name_not_allowed"},
		"an SVID of this domain":      {[][]byte{with(func(c *x509.Certificate) { c.URIs = uris("spiffe://example.org/web") }), issuing.cert.Raw}, "leaf_is_svid"},
		"an SVID in capitals":         {[][]byte{with(func(c *x509.Certificate) { c.URIs = uris("SPIFFE://Example.org/web") }), issuing.cert.Raw}, "leaf_is_svid"},
		"17 URIs":                     {[][]byte{with(func(c *x509.Certificate) { c.URIs = slices.Repeat(uris("x509pop://example.org/a:b"), 17) }), issuing.cert.Raw}, "name_not_allowed"},
	}
	told := map[string]bool{}
	records := &book{}
	pop := newPop([]*x509.Certificate{root.cert}, records)
	for name, c := range cases {
		got, err := pop.Attest(t.Context(), attest.Evidence{Payload: popPayload(t, c.ders...), PublicKey: key.Public(), Export: fakeExport},
			func(context.Context, []byte) ([]byte, error) {
				t.Errorf("%s: was asked for a signature", name)
				return nil, errors.New("no")
			})
		if fault.KindOf(err) != fault.Denied || fault.ReasonOf(err) != "x509pop_refused" || fault.CauseOf(err) != c.why || !got.AgentID.IsZero() {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		told[fault.SafeText(err)] = true
	}
	if len(told) != 1 || records.calls != 0 {
		t.Errorf("refusals can be told apart, or are recorded: %v, %d", told, records.calls)
	}
}

// The dearest thing that a stranger can have us do: five certificates with RSA
// keys of 8192 bits and signatures that have to be calculated to be refused.
func TestX509PopCostsAStrangerAsMuch(t *testing.T) { // NEG-27
	signer, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	big8192 := rsaPublic(8192)
	var ders [][]byte
	names := []string{"leaf", "a", "b", "c", "d", "root"}
	for i, name := range names[:5] {
		c := template(name)
		if i > 0 {
			c = caTemplate(name)
		}
		issuer := caTemplate(names[i+1])
		cert := (&nodeCA{cert: issuer, key: signer}).sign(t, c, big8192)
		ders = append(ders, resigned(t, cert, append([]byte{1}, make([]byte, 1023)...)))
	}
	pop := newPop([]*x509.Certificate{newNodeCA(t, "root").cert}, &book{})
	began := time.Now()
	_, err = pop.Attest(t.Context(), attest.Evidence{Payload: popPayload(t, ders...), PublicKey: signer.Public(), Export: fakeExport}, nil)
	t.Logf("took %v", time.Since(began))
	if fault.CauseOf(err) != "chain_untrusted" {
		t.Error(err)
	}
}

func TestX509PopNeedsTheKeyOnThisConnection(t *testing.T) {
	root := newNodeCA(t, "root")
	key, certify := ecKey(t, elliptic.P256()), newKey(t, elliptic.P256())
	leaf := root.sign(t, template("node"), key.Public())
	sibling := root.sign(t, template("node"), key.Public())
	mine, theirs := connect(t)
	elsewhere, _ := connect(t)
	good := holder{key: key, leaf: leaf.Raw, export: mine.ExportKeyingMaterial, certify: certify.Public()}
	change := func(f func(*holder)) *holder {
		h := good
		f(&h)
		return &h
	}
	records := &book{}
	pop := newPop([]*x509.Certificate{root.cert}, records)
	evidence := attest.Evidence{Payload: popPayload(t, leaf.Raw), PublicKey: certify.Public(), Export: theirs.ExportKeyingMaterial}
	for name, h := range map[string]*holder{
		"another key":             change(func(h *holder) { h.key = newKey(t, elliptic.P256()) }),
		"the key to be certified": change(func(h *holder) { h.key = certify }),
		"another connection":      change(func(h *holder) { h.export = elsewhere.ExportKeyingMaterial }), // a man in the middle
		"for another new key":     change(func(h *holder) { h.certify = key.Public() }),
		"for another certificate": change(func(h *holder) { h.leaf = sibling.Raw }),
		"another nonce": change(func(h *holder) {
			h.export = func(label string, nonce []byte, length int) ([]byte, error) {
				return mine.ExportKeyingMaterial(label, make([]byte, len(nonce)), length)
			}
		}),
		"another label": change(func(h *holder) {
			h.export = func(_ string, nonce []byte, length int) ([]byte, error) {
				return mine.ExportKeyingMaterial("EXPORTER-assay-rejoin", nonce, length)
			}
		}),
		"without its beginning": change(func(h *holder) { h.message = func(m []byte) []byte { return m[64:] } }),
		"no signature":          change(func(h *holder) { h.response = func([]byte) []byte { return nil } }),
		"a long signature": change(func(h *holder) {
			h.response = func(b []byte) []byte { return protowire.AppendBytes([]byte{0x0a}, make([]byte, 60000)) }
		}),
	} {
		got, err := pop.Attest(t.Context(), evidence, h.ask(t))
		if fault.ReasonOf(err) != "x509pop_refused" || fault.CauseOf(err) != "possession_unproven" || !got.AgentID.IsZero() {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	// An answer of before is worth nothing: the nonce is new.
	var old []byte
	recorded := change(func(h *holder) { h.response = func(b []byte) []byte { old = b; return b } })
	if _, err := pop.Attest(t.Context(), evidence, recorded.ask(t)); err != nil {
		t.Fatal(err)
	}
	_, err := pop.Attest(t.Context(), evidence, func(context.Context, []byte) ([]byte, error) { return old, nil })
	if fault.CauseOf(err) != "possession_unproven" {
		t.Errorf("an old answer: %v", err)
	}
	if records.calls != 1 {
		t.Errorf("recorded %d times", records.calls)
	}
	broken := errors.New("broken off")
	if _, err := pop.Attest(t.Context(), evidence, func(context.Context, []byte) ([]byte, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	evidence.Export = func(string, []byte, int) ([]byte, error) { return nil, broken }
	if _, err := pop.Attest(t.Context(), evidence, good.ask(t)); !errors.Is(err, broken) || errors.Is(err, fault.Denied) {
		t.Errorf("got %v", err)
	}
}

// A node that was refused by its record learns so only after it proved to be
// that node, and whoever watches learns which node it was.
func TestX509PopLeavesTheLastWordToTheRecord(t *testing.T) { // NEG-13
	root := newNodeCA(t, "root")
	key := ecKey(t, elliptic.P256())
	leaf := root.sign(t, template("node"), key.Public())
	records := &book{err: fault.New(fault.Denied, "agent_banned", "banned")}
	h := &holder{key: key, leaf: leaf.Raw, export: fakeExport, certify: key.Public()}
	got, err := newPop([]*x509.Certificate{root.cert}, records).Attest(t.Context(),
		attest.Evidence{Payload: popPayload(t, leaf.Raw), PublicKey: key.Public(), Export: fakeExport}, h.ask(t))
	if fault.ReasonOf(err) != "agent_banned" || got.AgentID != records.id || records.calls != 1 {
		t.Errorf("%+v, %v", got, err)
	}
}

// Everybody can make a second valid signature of an ECDSA signature, and so
// another certificate, in DER, that says the same: it is the same agent, or a
// ban would bind nobody.
func TestX509PopNamesTheAgentByWhatWasSigned(t *testing.T) { // NEG-13
	root := newNodeCA(t, "root")
	key := ecKey(t, elliptic.P256())
	leaf := root.sign(t, template("node"), key.Public())
	twin := resigned(t, leaf, otherSignature(t, leaf.Signature))
	if slices.Equal(twin, leaf.Raw) {
		t.Fatal("the twin is the same")
	}
	var ids []string
	for _, der := range [][]byte{leaf.Raw, twin} {
		h := &holder{key: key, leaf: der, export: fakeExport, certify: key.Public()}
		got, err := newPop([]*x509.Certificate{root.cert}, &book{}).Attest(t.Context(),
			attest.Evidence{Payload: popPayload(t, der), PublicKey: key.Public(), Export: fakeExport}, h.ask(t))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, got.AgentID.String())
	}
	if ids[0] != ids[1] {
		t.Errorf("two agents of one certificate: %v", ids)
	}
}

// NEG-17: a payload has one reading. Protobuf would let the last of two
// signatures win and skip what it doesn't know.
func TestAmbiguousEvidenceIsRefused(t *testing.T) {
	root := newNodeCA(t, "root")
	key := ecKey(t, elliptic.P256())
	leaf := root.sign(t, template("node"), key.Public())
	payload := popPayload(t, leaf.Raw)
	records := &book{}
	pop := newPop([]*x509.Certificate{root.cert}, records)
	for name, data := range map[string][]byte{
		"an unknown field":       protowire.AppendVarint(protowire.AppendTag(slices.Clone(payload), 9, protowire.VarintType), 1),
		"a field of other type":  protowire.AppendVarint(protowire.AppendTag(slices.Clone(payload), 1, protowire.VarintType), 1),
		"a document in a group":  protowire.AppendTag(protowire.AppendTag(slices.Clone(payload), 2, protowire.StartGroupType), 2, protowire.EndGroupType),
		"certificates elsewhere": protowire.AppendBytes(protowire.AppendTag(slices.Clone(payload), 2, protowire.BytesType), leaf.Raw),
	} {
		_, err := pop.Attest(t.Context(), attest.Evidence{Payload: data, PublicKey: key.Public(), Export: fakeExport}, nil)
		if fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != "payload_ambiguous" {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, data := range map[string][]byte{"cut off": payload[:len(payload)-1], "no protobuf": []byte("\xff\xff\xff")} {
		_, err := pop.Attest(t.Context(), attest.Evidence{Payload: data, PublicKey: key.Public(), Export: fakeExport}, nil)
		if fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != "payload_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	twice := &holder{key: key, leaf: leaf.Raw, export: fakeExport, certify: key.Public(), response: func(b []byte) []byte {
		return append(protowire.AppendBytes([]byte{0x0a}, []byte("another signature")), b...)
	}}
	_, err := pop.Attest(t.Context(), attest.Evidence{Payload: payload, PublicKey: key.Public(), Export: fakeExport}, twice.ask(t))
	if fault.ReasonOf(err) != "payload_ambiguous" || twice.asked != 1 || records.calls != 0 {
		t.Errorf("two signatures: %v", err)
	}
}

// The selectors of SPIRE's attestor of this name.
func TestX509PopSelectors(t *testing.T) {
	root := newNodeCA(t, "root")
	issuing := root.below(t, "issuing")
	key := ecKey(t, elliptic.P256())
	c := template("node-7.example")
	c.URIs = uris("x509pop://example.org/rack:b:7", "x509pop://other.org/rack:x", "https://example.org/a:b", "spiffe://other.org/x")
	c.DNSNames = []string{"node-7.example"}
	leaf := issuing.sign(t, c, key.Public())
	// Other authorities in the payload or the bundle count for nothing.
	spare := newNodeCA(t, "spare")
	records := &book{}
	h := &holder{key: key, leaf: leaf.Raw, export: fakeExport, certify: key.Public()}
	got, err := newPop([]*x509.Certificate{root.cert, spare.cert}, records).Attest(t.Context(),
		attest.Evidence{Payload: popPayload(t, leaf.Raw, issuing.cert.Raw, root.cert.Raw), PublicKey: key.Public(), Export: fakeExport}, h.ask(t))
	if err != nil {
		t.Fatal(err)
	}
	want := []selector.Selector{
		{Type: "x509pop", Value: "subject:cn:node-7.example"}, {Type: "x509pop", Value: "serialnumber:0a1b2c"}, {Type: "x509pop", Value: "san:rack:b:7"},
	}
	for _, ca := range []*nodeCA{root, issuing} {
		old, sum := sha1.Sum(ca.cert.Raw), sha256.Sum256(ca.cert.Raw)
		want = append(want, selector.Selector{Type: "x509pop", Value: "ca:fingerprint:" + hex.EncodeToString(old[:])},
			selector.Selector{Type: "x509pop", Value: "ca:fingerprint:" + hex.EncodeToString(sum[:])})
	}
	if !slices.Equal(got.Selectors, selector.NewSet(want...)) {
		t.Errorf("got %v", got.Selectors)
	}
	plain := root.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), KeyUsage: x509.KeyUsageDigitalSignature, NotBefore: c.NotBefore, NotAfter: c.NotAfter,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, // SPIRE demands none, nor do we
	}, key.Public())
	h.leaf = plain.Raw
	got, err = newPop([]*x509.Certificate{root.cert}, records).Attest(t.Context(),
		attest.Evidence{Payload: popPayload(t, plain.Raw), PublicKey: key.Public(), Export: fakeExport}, h.ask(t))
	if err != nil || len(got.Selectors) != 3 { // serial number and the root's fingerprints
		t.Errorf("got %v, %v", got.Selectors, err)
	}
}

func uris(texts ...string) (list []*url.URL) {
	for _, text := range texts {
		u, err := url.Parse(text)
		if err != nil {
			panic(err)
		}
		list = append(list, u)
	}
	return list
}

func parse(t *testing.T, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func twoNames(t *testing.T) []byte {
	t.Helper()
	cn := asn1.ObjectIdentifier{2, 5, 4, 3}
	der, err := asn1.Marshal(pkix.RDNSequence{{{Type: cn, Value: "web-1"}}, {{Type: cn, Value: "db-1"}}})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// swapKey puts another SubjectPublicKeyInfo into a certificate; its signature
// is of no account, since keys are looked at before.
func swapKey(t *testing.T, der, spki []byte) []byte {
	t.Helper()
	old := parse(t, der)
	var tbs []asn1.RawValue
	if _, err := asn1.Unmarshal(old.RawTBSCertificate, &tbs); err != nil {
		t.Fatal(err)
	}
	for i, part := range tbs {
		if slices.Equal(part.FullBytes, old.RawSubjectPublicKeyInfo) {
			tbs[i] = asn1.RawValue{FullBytes: spki}
		}
	}
	changed, err := asn1.Marshal(tbs)
	if err != nil {
		t.Fatal(err)
	}
	var outer []asn1.RawValue
	if _, err := asn1.Unmarshal(der, &outer); err != nil {
		t.Fatal(err)
	}
	outer[0] = asn1.RawValue{FullBytes: changed}
	out, err := asn1.Marshal(outer)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

type spki struct {
	Algorithm pkix.AlgorithmIdentifier
	Key       asn1.BitString
}

func dsaSPKI(t *testing.T) []byte {
	t.Helper()
	params, err := asn1.Marshal(dsa.Parameters{P: big.NewInt(283), Q: big.NewInt(47), G: big.NewInt(60)})
	if err != nil {
		t.Fatal(err)
	}
	return marshalSPKI(t, asn1.ObjectIdentifier{1, 2, 840, 10040, 4, 1}, params, []byte{2, 1, 57})
}

func unknownSPKI(t *testing.T) []byte {
	return marshalSPKI(t, asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, nil, []byte("what is this"))
}

func marshalSPKI(t *testing.T, id asn1.ObjectIdentifier, params, key []byte) []byte {
	t.Helper()
	der, err := asn1.Marshal(spki{pkix.AlgorithmIdentifier{Algorithm: id, Parameters: asn1.RawValue{FullBytes: params}}, asn1.BitString{Bytes: key, BitLength: 8 * len(key)}})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// security.md: a certificate that is no authority's, configured as an anchor,
// would let its holder in. What else is in the file is refused too.
func TestNodeRootsAreAuthoritiesAlone(t *testing.T) {
	root := newNodeCA(t, "root")
	key := ecKey(t, elliptic.P256())
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	good := block("CERTIFICATE", root.cert.Raw)
	list, err := attest.ParseNodeRoots([]byte("\n" + good + "\n\n" + block("CERTIFICATE", newNodeCA(t, "other").cert.Raw)))
	if err != nil || len(list) != 2 {
		t.Fatalf("%d, %v", len(list), err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	noSign := caTemplate("root")
	noSign.KeyUsage = x509.KeyUsageCRLSign
	for name, text := range map[string]string{
		"nothing":            "",
		"no PEM":             "x",
		"text behind it":     good + "x",
		"a node's":           good + block("CERTIFICATE", root.sign(t, template("node"), key.Public()).Raw),
		"a private key":      good + block("PRIVATE KEY", pkcs8),
		"damaged":            good + block("CERTIFICATE", root.cert.Raw[1:]),
		"can't sign":         block("CERTIFICATE", root.sign(t, noSign, key.Public()).Raw),
		"a weak key":         block("CERTIFICATE", root.sign(t, caTemplate("weak"), rsaPublic(1024)).Raw),
		"a key that is dear": block("CERTIFICATE", root.sign(t, caTemplate("large"), rsaPublic(16384)).Raw),
		"101 of them":        strings.Repeat(good, 101),
	} {
		if list, err := attest.ParseNodeRoots([]byte(text)); err == nil {
			t.Errorf("%s: took %d", name, len(list))
		}
	}
}

// Nothing that is sent makes the attestor accept, record or panic: the keys of
// the certificates that it could believe are nobody's. The seeds are NEG-27's
// shapes.
func FuzzX509PopPayload(f *testing.F) {
	root := newNodeCA(f, "root")
	issuing := root.below(f, "issuing")
	key := ecKey(f, elliptic.P256())
	good := issuing.sign(f, template("node"), key.Public()).Raw
	for _, ders := range [][][]byte{
		{},
		{good},
		{good, issuing.cert.Raw},
		{issuing.cert.Raw, root.cert.Raw},
		{good, good},
		slices.Repeat([][]byte{issuing.cert.Raw}, 100),
		{issuing.sign(f, template("node"), rsaPublic(16384)).Raw, issuing.cert.Raw},
		{root.cert.Raw},
		{nil},
		{[]byte("x")},
	} {
		f.Add(popPayload(f, ders...), []byte("answer"))
	}
	f.Add(append(popPayload(f, good, issuing.cert.Raw), 0x10, 1), []byte{0x0a, 0})
	f.Add(popPayload(f, good, issuing.cert.Raw), append([]byte{0x0a, 70}, make([]byte, 70)...))
	records := &book{}
	pop := newPop([]*x509.Certificate{root.cert}, records)
	f.Fuzz(func(t *testing.T, payload, answer []byte) {
		_, err := pop.Attest(t.Context(), attest.Evidence{Payload: payload, PublicKey: key.Public(), Export: fakeExport},
			func(context.Context, []byte) ([]byte, error) { return answer, nil })
		switch fault.ReasonOf(err) {
		case "x509pop_refused", "payload_ambiguous", "payload_malformed":
		default:
			t.Fatalf("%x, %x: %v", payload, answer, err)
		}
		if records.calls != 0 {
			t.Fatalf("%x, %x: recorded", payload, answer)
		}
	})
}

// Whatever is in the file, it is read or refused.
func FuzzNodeRoots(f *testing.F) {
	root := newNodeCA(f, "root")
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.cert.Raw}))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := attest.ParseNodeRoots(data)
		if err == nil && len(list) == 0 {
			t.Fatal("no roots and no error")
		}
		for _, c := range list {
			if !c.IsCA {
				t.Fatalf("%s is no authority", c.Subject)
			}
		}
	})
}
