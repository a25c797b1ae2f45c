package node_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/agent/node"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/pkg/schedule"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// prove is the server's side of attestor "x509pop", without a look at who
// issued the certificate. It is called with f.mu held.
func (f *fake) prove(stream grpc.BidiStreamingServer[agentv1.AttestRequest, agentv1.AttestResponse], payload []byte, csr *x509.CertificateRequest) (string, error) {
	var p agentv1.X509PopPayload
	if err := proto.Unmarshal(payload, &p); err != nil {
		return "", fault.New(fault.Invalid, "payload_malformed", "not a payload")
	}
	cert := must(x509.ParseCertificate(p.GetCertificates()[0]))
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce)
	challenges := f.challenges
	if challenges == nil {
		challenges = [][]byte{must(proto.Marshal(&agentv1.X509PopChallenge{Nonce: nonce}))}
	}
	var answer agentv1.X509PopResponse
	for _, challenge := range challenges {
		if err := stream.Send(&agentv1.AttestResponse{Step: &agentv1.AttestResponse_Challenge{Challenge: challenge}}); err != nil {
			return "", err
		}
		msg, err := stream.Recv()
		if err != nil {
			return "", err
		}
		if err := proto.Unmarshal(msg.GetChallengeResponse(), &answer); err != nil {
			return "", err
		}
	}
	conn, _ := rpc.ConnectionState(stream.Context())
	exported := must(conn.ExportKeyingMaterial("EXPORTER-assay-x509pop", nonce, 32))
	message := agentv1.X509PopMessage(exported, cert.Raw, csr.RawSubjectPublicKeyInfo)
	refused := fault.New(fault.Denied, "x509pop_refused", "the server does not take this node's certificate")
	if time.Now().After(cert.NotAfter) || !verifies(cert.PublicKey, message, answer.GetSignature()) {
		return "", refused
	}
	if f.taken[hash(csr.RawSubjectPublicKeyInfo)] {
		return "", fault.New(fault.Denied, "binding_mismatch", "this key is another agent's")
	}
	id := popID(cert)
	if f.agents[id] == nil {
		f.agents[id] = &record{}
	}
	return id, nil
}

func popID(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawTBSCertificate)
	return "spiffe://example.org/assay/agent/x509pop/" + hex.EncodeToString(sum[:])
}

func verifies(key crypto.PublicKey, message, signature []byte) bool {
	sum256, sum384, sum512 := sha256.Sum256(message), crypto.SHA384.New(), crypto.SHA512.New()
	sum384.Write(message)
	sum512.Write(message)
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		digest := map[int][]byte{256: sum256[:], 384: sum384.Sum(nil), 521: sum512.Sum(nil)}[key.Params().BitSize]
		return ecdsa.VerifyASN1(key, digest, signature)
	case *rsa.PublicKey:
		return rsa.VerifyPSS(key, crypto.SHA256, sum256[:], signature, &rsa.PSSOptions{SaltLength: 32}) == nil
	case ed25519.PublicKey:
		return ed25519.Verify(key, message, signature)
	}
	return false
}

// nodeCert is a certificate of an authority that the fake does not look at.
func nodeCert(public crypto.PublicKey, life time.Duration) *x509.Certificate {
	ca := newAuthority()
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "node"}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
	}
	return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, ca.cert, public, ca.key))))
}

func block(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// giveCertificate makes h a node that proves itself by certificate.
func (h *host) giveCertificate(cert *x509.Certificate, key []byte) {
	h.t.Helper()
	h.cfg.JoinTokenFile = ""
	h.cfg.X509Pop = node.X509Pop{CertificateFile: filepath.Join(h.dir, "node.pem"), PrivateKeyFile: filepath.Join(h.dir, "node.key")}
	h.put(h.cfg.X509Pop.CertificateFile, block("CERTIFICATE", cert.Raw), 0o644)
	h.put(h.cfg.X509Pop.PrivateKeyFile, key, 0o600)
}

func (h *host) put(path string, data []byte, mode os.FileMode) {
	h.t.Helper()
	if err := os.WriteFile(path, data, mode); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		h.t.Fatal(err)
	}
}

// newNodeKey is an ECDSA key, as openssl ecparam -genkey writes it.
func newNodeKey() (*ecdsa.PrivateKey, []byte) {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	parameters := block("EC PARAMETERS", []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07})
	return key, append(parameters, block("EC PRIVATE KEY", must(x509.MarshalECPrivateKey(key)))...)
}

func TestNodeProvesItselfByEachKindOfKey(t *testing.T) {
	rsaKey := must(rsa.GenerateKey(rand.Reader, 2048))
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, p256File := newNodeKey()
	p384, p521 := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)), must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	pkcs8 := func(key any) []byte { return block("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(key))) }
	for name, c := range map[string]struct {
		key  crypto.Signer
		file []byte
	}{
		"P-256": {p256, p256File}, "P-384": {p384, pkcs8(p384)}, "P-521": {p521, pkcs8(p521)},
		"RSA": {rsaKey, block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey))}, "RSA in PKCS#8": {rsaKey, pkcs8(rsaKey)}, "Ed25519": {edKey, pkcs8(edKey)},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, h *host) {
				cert := nodeCert(c.key.Public(), time.Hour)
				h.giveCertificate(cert, c.file)
				h.start()
				h.conn().Release()
				if id := h.identity(); id.AgentID.String() != popID(cert) || id.TokenHash != "" {
					t.Errorf("attested as %s", id.AgentID)
				}
				if err := h.stop(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// An agent that was away for longer than its SVID lives, or has lost its disk,
// attests by the certificate that is there now; there is no window for it.
func TestNodeAttestsAnewByTheCertificateThatIsThere(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		key, file := newNodeKey()
		cert := nodeCert(key.Public(), 365*24*time.Hour)
		h.giveCertificate(cert, file)
		h.start()
		h.conn().Release()
		first := h.identity()
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * 24 * time.Hour)
		h.start()
		h.conn().Release()
		if again := h.identity(); again.AgentID != first.AgentID || again.Key.Equal(first.Key) {
			t.Errorf("came back as %s", again.AgentID)
		}
		if f.count("Attest/x509pop") != 2 || f.count("Attest/rejoin") != 0 {
			t.Errorf("attested %d times, tried to rejoin %d times", f.count("Attest/x509pop"), f.count("Attest/rejoin"))
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(filepath.Join(h.dir, "data")); err != nil {
			t.Fatal(err)
		}
		h.start()
		h.conn().Release()
		if again := h.identity(); again.AgentID != first.AgentID {
			t.Errorf("came back without a disk as %s", again.AgentID)
		}
		// Renewed in place, read without a restart, when it is next needed.
		renewed := nodeCert(key.Public(), 365*24*time.Hour)
		h.put(h.cfg.X509Pop.CertificateFile, block("CERTIFICATE", renewed.Raw), 0o644)
		f.with(func() { clear(f.agents) }) // evicted
		time.Sleep(12 * time.Hour)
		h.conn().Release()
		if again := h.identity(); again.AgentID.String() != popID(renewed) {
			t.Errorf("the renewed certificate was not read: %s", again.AgentID)
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// Files that can't be used are named in the log, with nothing of what is in
// them, and read again until they can be.
func TestUnusableNodeFilesAreNamedAndReadAgain(t *testing.T) {
	key, file := newNodeKey()
	_, otherFile := newNodeKey()
	canary := "CANARY-of-a-key"
	type files struct {
		cert, key []byte
		certMode  os.FileMode
		keyMode   os.FileMode
	}
	for name, c := range map[string]struct {
		spoil  func(*files)
		reason string
	}{
		"a key that others can read":      {func(f *files) { f.keyMode = 0o644 }, "path_untrusted"},
		"a certificate others can change": {func(f *files) { f.certMode = 0o666 }, "path_untrusted"},
		"another key":                     {func(f *files) { f.key = otherFile }, "node_certificate_unusable"},
		"no key":                          {func(f *files) { f.key = []byte(canary) }, "node_certificate_unusable"},
		"a damaged key":                   {func(f *files) { f.key = block("PRIVATE KEY", []byte(canary)) }, "node_certificate_unusable"},
		"a key with a passphrase":         {func(f *files) { f.key = block("ENCRYPTED PRIVATE KEY", []byte(canary)) }, "node_certificate_unusable"},
		"no certificate":                  {func(f *files) { f.cert = nil }, "node_certificate_unusable"},
		"key and certificate in one":      {func(f *files) { f.cert = append(f.cert, file...) }, "node_certificate_unusable"},
		"a damaged certificate":           {func(f *files) { f.cert = block("CERTIFICATE", []byte(canary)) }, "node_certificate_unusable"},
		"a large file":                    {func(f *files) { f.cert = make([]byte, 1<<20) }, "file_too_large"},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, h *host) {
				var log logBuffer
				h.logTo = &log
				cert := nodeCert(key.Public(), 24*time.Hour)
				h.giveCertificate(cert, file)
				bad := files{cert: block("CERTIFICATE", cert.Raw), key: file, certMode: 0o644, keyMode: 0o600}
				c.spoil(&bad)
				h.put(h.cfg.X509Pop.CertificateFile, bad.cert, bad.certMode)
				h.put(h.cfg.X509Pop.PrivateKeyFile, bad.key, bad.keyMode)
				h.start()
				time.Sleep(time.Minute)
				synctest.Wait()
				if !strings.Contains(log.String(), c.reason) || f.count("Attest/x509pop") != 0 {
					t.Errorf("%d attempts, log: %s", f.count("Attest/x509pop"), log.String())
				}
				if strings.Contains(log.String(), canary) || strings.Contains(log.String(), "BEGIN") { // NEG-18
					t.Error("the content of a file is in the log")
				}
				h.giveCertificate(cert, file)
				h.conn().Release()
				if err := h.stop(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// The server says one thing to whoever it refuses; what the node can see for
// itself is in its own log.
func TestExpiredNodeCertificateIsSaidSo(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		var log logBuffer
		h.logTo = &log
		key, file := newNodeKey()
		h.giveCertificate(nodeCert(key.Public(), -time.Second), file)
		h.start()
		time.Sleep(time.Hour)
		synctest.Wait()
		if !strings.Contains(log.String(), "node_certificate_expired") || !strings.Contains(log.String(), "node.pem is valid from") {
			t.Errorf("log: %s", log.String())
		}
		if n := f.count("Attest/x509pop"); n < 30 || n > 240 {
			t.Errorf("%d attempts in an hour", n)
		}
		renewed := nodeCert(key.Public(), 24*time.Hour)
		h.put(h.cfg.X509Pop.CertificateFile, block("CERTIFICATE", renewed.Raw), 0o644)
		h.conn().Release()
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// NEG-19: two machines with one certificate take the identity from each other,
// but not as fast as they can: neither the server nor its audit log drowns.
func TestMachinesWithOneCertificateDoNotFightAsFastAsTheyCan(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		key, file := newNodeKey()
		cert := nodeCert(key.Public(), 24*time.Hour)
		second := *h
		second.dir = filepath.Join(h.dir, "second")
		if err := os.Mkdir(second.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		var followers sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		defer followers.Wait()
		defer cancel()
		for _, m := range []*host{h, &second} {
			m.giveCertificate(cert, file)
			m.start()
			m.conn().Release()
			// What the agent's cache does: it follows, and so it is told.
			followers.Go(func() { follow(ctx, m) })
		}
		defer second.kill()
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := f.count("Attest/x509pop"); n < 20 || n > 400 {
			t.Errorf("%d attestations in an hour", n)
		}
		if f.known() != 1 {
			t.Errorf("%d agents", f.known())
		}
		if err := second.stop(); err != nil {
			t.Fatal(err)
		}
		second.cancel = nil
		time.Sleep(5 * time.Minute)
		h.conn().Release() // alone, it is the agent
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// follow keeps a stream open on whatever connection there is, until ctx ends.
func follow(ctx context.Context, h *host) {
	for ctx.Err() == nil {
		c, err := h.node.Conn(ctx)
		if err != nil {
			return
		}
		if stream, err := c.Client.Sync(ctx); err == nil {
			for err == nil {
				_, err = stream.Recv()
			}
		}
		c.Release()
		_ = schedule.Sleep(ctx, time.Second)
	}
}

// NEG-19: a data directory that was copied has a key that the server knows as
// another's. The agent makes one of its own.
func TestKeyOfAnotherAgentIsReplaced(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		key, file := newNodeKey()
		h.giveCertificate(nodeCert(key.Public(), 24*time.Hour), file)
		f.lose["Attest"] = 1
		h.start()
		synctest.Wait()
		copied := f.certified()
		f.with(func() { f.taken = map[string]bool{copied[0]: true} })
		h.conn().Release()
		if keys := f.certified(); len(keys) != 2 || slices.Contains(keys[1:], copied[0]) {
			t.Errorf("certified: %v", keys)
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// A server's questions are answered if they are the one that belongs to the
// attestor; the node's key signs nothing else.
func TestOtherChallengesAreNotAnswered(t *testing.T) {
	question := must(proto.Marshal(&agentv1.X509PopChallenge{Nonce: make([]byte, 32)}))
	for name, c := range map[string]struct {
		challenges [][]byte
		reason     string
	}{
		"no challenge": {[][]byte{[]byte("sign this")}, "challenge_invalid"},
		"no nonce":     {[][]byte{{}}, "challenge_invalid"},
		"a long nonce": {[][]byte{must(proto.Marshal(&agentv1.X509PopChallenge{Nonce: make([]byte, 33)}))}, "challenge_invalid"},
		"two of them":  {[][]byte{question, question}, "challenge_unexpected"},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, h *host) {
				var log logBuffer
				h.logTo = &log
				key, file := newNodeKey()
				h.giveCertificate(nodeCert(key.Public(), 24*time.Hour), file)
				f.challenges = c.challenges
				h.start()
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if !strings.Contains(log.String(), c.reason) {
					t.Errorf("log: %s", log.String())
				}
				if err := h.stop(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}
