package attest_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/attest"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/store"
)

// records returns a registry over a real store.
func records(t *testing.T) *registry.Registry {
	t.Helper()
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	kv, err := store.OpenBolt(store.BoltConfig{Dir: t.TempDir(), Log: log, NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	r, err := registry.Open(t.Context(), registry.Options{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), ReservedPrefix: "/assay/", RejoinWindow: time.Hour,
		MaxX509SVIDTTL: time.Hour, Store: kv, Log: log, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, kv.Close()); err != nil {
			t.Error(err)
		}
	})
	return r
}

func newKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// connect returns both ends of a real TLS 1.3 connection.
func connect(t *testing.T) (agent, server tls.ConnectionState) {
	t.Helper()
	key := newKey(t, elliptic.P256())
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	client := tls.Client(a, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
	srv := tls.Server(b, &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
	})
	t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
	failed := make(chan error, 1)
	go func() { failed <- srv.HandshakeContext(t.Context()) }()
	if err := errors.Join(client.HandshakeContext(t.Context()), <-failed); err != nil {
		t.Fatal(err)
	}
	return client.ConnectionState(), srv.ConnectionState()
}

// joined attests an agent by token and has a certificate recorded for its key.
func joined(t *testing.T, r *registry.Registry, key crypto.Signer) spiffeid.ID {
	t.Helper()
	token, err := r.CreateToken(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	got, err := attest.NewJoinToken(r).Attest(t.Context(), attest.Evidence{Payload: []byte(token.Value), PublicKey: key.Public()}, nil)
	if err != nil || got.AgentID != token.AgentID || got.CanReattest {
		t.Fatalf("%+v, %v", got, err)
	}
	hash, err := attest.KeyHash(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.RecordIssued(t.Context(), got.AgentID, registry.Issued{Serial: "01", KeyHash: hash, NotAfter: time.Now().Add(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	return got.AgentID
}

// payload is the evidence of an agent that holds key, on its end of the
// connection.
func payload(t *testing.T, agent spiffeid.ID, key *ecdsa.PrivateKey, end tls.ConnectionState) *agentv1.RejoinPayload {
	t.Helper()
	material, err := end.ExportKeyingMaterial("EXPORTER-assay-rejoin", []byte(agent.String()), 32)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(material)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &agentv1.RejoinPayload{AgentId: agent.String(), PublicKey: spki, Signature: signature}
}

func encode(t *testing.T, p *agentv1.RejoinPayload) []byte {
	t.Helper()
	data, err := proto.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestJoinTokenBindsTheKey(t *testing.T) { // NEG-11, NEG-14
	r := records(t)
	token, err := r.CreateToken(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	a := attest.NewJoinToken(r)
	first, other := newKey(t, elliptic.P256()), newKey(t, elliptic.P256())
	for range 2 {
		got, err := a.Attest(t.Context(), attest.Evidence{Payload: []byte(token.Value), PublicKey: first.Public()}, nil)
		if err != nil || got.AgentID != token.AgentID {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	for _, text := range []string{token.Value, "", "x", strings.ToUpper(token.Value)} {
		got, err := a.Attest(t.Context(), attest.Evidence{Payload: []byte(text), PublicKey: other.Public()}, nil)
		if fault.ReasonOf(err) != "join_token_invalid" || !got.AgentID.IsZero() {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if _, err := a.Attest(t.Context(), attest.Evidence{Payload: []byte(token.Value), PublicKey: "no key"}, nil); err == nil {
		t.Error("attested without a key")
	}
}

func TestRejoinWithTheRecordedKey(t *testing.T) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		r := records(t)
		key := newKey(t, curve)
		agent := joined(t, r, key)
		mine, theirs := connect(t)
		got, err := attest.NewRejoin(r).Attest(t.Context(), attest.Evidence{
			Payload: encode(t, payload(t, agent, key, mine)), PublicKey: newKey(t, elliptic.P256()).Public(), Export: theirs.ExportKeyingMaterial,
		}, nil)
		if err != nil || got.AgentID != agent || !got.CanReattest {
			t.Errorf("%v: %+v, %v", curve.Params().Name, got, err)
		}
	}
}

func TestRejoinRefusesEverythingElseAlike(t *testing.T) {
	r := records(t)
	key, strange := newKey(t, elliptic.P256()), newKey(t, elliptic.P256())
	agent, other := joined(t, r, key), joined(t, r, strange)
	mine, theirs := connect(t)
	elsewhere, _ := connect(t)
	good := func() *agentv1.RejoinPayload { return payload(t, agent, key, mine) }
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edwards, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	change := func(f func(*agentv1.RejoinPayload)) []byte {
		p := good()
		f(p)
		return encode(t, p)
	}
	unknown := spiffeid.RequireFromString("spiffe://example.org/assay/agent/join_token/00")
	cases := map[string][]byte{
		"nothing":                   nil,
		"no protobuf":               []byte("\xff\xff\xff"),
		"another connection":        encode(t, payload(t, agent, key, elsewhere)),
		"a key not on record":       encode(t, payload(t, agent, newKey(t, elliptic.P256()), mine)),
		"another agent's key":       encode(t, payload(t, agent, strange, mine)), // NEG-19
		"unknown agent":             encode(t, payload(t, unknown, key, mine)),
		"signature for another ID":  change(func(p *agentv1.RejoinPayload) { p.AgentId = other.String() }),
		"no ID":                     change(func(p *agentv1.RejoinPayload) { p.AgentId = "" }),
		"ID not canonical":          change(func(p *agentv1.RejoinPayload) { p.AgentId += "/" }),
		"ID too long":               change(func(p *agentv1.RejoinPayload) { p.AgentId += strings.Repeat("a", 3000) }),
		"flipped bit":               change(func(p *agentv1.RejoinPayload) { p.Signature[len(p.Signature)-1] ^= 1 }),
		"no signature":              change(func(p *agentv1.RejoinPayload) { p.Signature = nil }),
		"signature with more bytes": change(func(p *agentv1.RejoinPayload) { p.Signature = append(p.Signature, 0) }),
		"signature too long":        change(func(p *agentv1.RejoinPayload) { p.Signature = make([]byte, 4096) }),
		"no key":                    change(func(p *agentv1.RejoinPayload) { p.PublicKey = nil }),
		"key with more bytes":       change(func(p *agentv1.RejoinPayload) { p.PublicKey = append(p.PublicKey, 0) }),
		"key of another kind":       change(func(p *agentv1.RejoinPayload) { p.PublicKey = edwards }),
		"signature over the agent ID of someone else's connection": encode(t, payload(t, other, key, mine)),
	}
	a := attest.NewRejoin(r)
	safe := map[string]bool{}
	for name, data := range cases {
		got, err := a.Attest(t.Context(), attest.Evidence{Payload: data, PublicKey: key.Public(), Export: theirs.ExportKeyingMaterial}, nil)
		if fault.KindOf(err) != fault.Denied || fault.ReasonOf(err) != "rejoin_refused" || !got.AgentID.IsZero() {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		safe[fault.SafeText(err)] = true
	}
	if len(safe) != 1 {
		t.Errorf("refusals can be told apart: %v", safe)
	}
	// The same on the same connection, unchanged, is good: nothing above was
	// refused for another reason than its own.
	if _, err := a.Attest(t.Context(), attest.Evidence{Payload: encode(t, good()), PublicKey: key.Public(), Export: theirs.ExportKeyingMaterial}, nil); err != nil {
		t.Error(err)
	}
}

func TestRejoinNeedsTheExporter(t *testing.T) {
	r := records(t)
	key := newKey(t, elliptic.P256())
	agent := joined(t, r, key)
	mine, _ := connect(t)
	broken := errors.New("no exporter")
	_, err := attest.NewRejoin(r).Attest(t.Context(), attest.Evidence{
		Payload: encode(t, payload(t, agent, key, mine)), PublicKey: key.Public(),
		Export: func(string, []byte, int) ([]byte, error) { return nil, broken },
	}, nil)
	if !errors.Is(err, broken) || errors.Is(err, fault.Denied) {
		t.Errorf("got %v", err)
	}
}

// open lets every key pass: only the proof of possession stands.
type open struct{}

func (open) Rejoinable(spiffeid.ID, string, time.Time) error { return nil }

// No bytes make the attestor accept without a signature of the key that they
// name, or panic.
func FuzzRejoinPayload(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		f.Fatal(err)
	}
	digest := sha256.Sum256([]byte("another connection"))
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		f.Fatal(err)
	}
	seed, err := proto.Marshal(&agentv1.RejoinPayload{AgentId: "spiffe://example.org/assay/agent/a", PublicKey: spki, Signature: signature})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte{})
	a := attest.NewRejoin(open{})
	export := func(string, []byte, int) ([]byte, error) { return []byte("this connection, 32 bytes of it.."), nil }
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := a.Attest(t.Context(), attest.Evidence{Payload: data, PublicKey: key.Public(), Export: export}, nil)
		if fault.ReasonOf(err) != "rejoin_refused" {
			t.Fatalf("%x: %v", data, err)
		}
	})
}
