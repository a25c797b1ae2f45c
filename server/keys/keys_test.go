package keys

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

var example = spiffeid.RequireTrustDomainFromString("example.org")

func newSealed(t testing.TB) *Sealed {
	t.Helper()
	k, err := NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	return NewSealed(k, example)
}

func wantReason(t *testing.T, err error, kind fault.Kind, reason string) {
	t.Helper()
	if !errors.Is(err, kind) || fault.ReasonOf(err) != reason {
		t.Fatalf("got error %v, want %s with reason %s", err, kind.Error(), reason)
	}
}

func TestSealedKeyOpensToTheSameKey(t *testing.T) {
	s := newSealed(t)
	for kt, curve := range map[Type]elliptic.Curve{ECP256: elliptic.P256(), ECP384: elliptic.P384()} {
		made, ref, err := s.Create(t.Context(), kt)
		if err != nil {
			t.Fatal(err)
		}
		pub := made.Public().(*ecdsa.PublicKey)
		if pub.Curve != curve {
			t.Errorf("%s: the key is on %s", kt, pub.Curve.Params().Name)
		}
		opened, err := s.Open(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		digest := sha256.Sum256([]byte("message"))
		sig, err := opened.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		if !ecdsa.VerifyASN1(pub, digest[:], sig) {
			t.Errorf("%s: the opened key is not the one that was made", kt)
		}
		if err := s.Destroy(t.Context(), ref); err != nil {
			t.Errorf("destroy: %v", err)
		}
	}
}

func TestUnknownKeyTypeIsRefused(t *testing.T) {
	_, _, err := newSealed(t).Create(t.Context(), "rsa-2048")
	wantReason(t, err, fault.Invalid, "key_type_unknown")
}

// Every byte of a reference counts.
func TestChangedReferenceDoesNotOpen(t *testing.T) {
	s := newSealed(t)
	_, ref, err := s.Create(t.Context(), ECP256)
	if err != nil {
		t.Fatal(err)
	}
	for i := range ref {
		changed := bytes.Clone(ref)
		changed[i] ^= 1
		if _, err := s.Open(t.Context(), changed); !errors.Is(err, fault.Precondition) {
			t.Errorf("byte %d changed: got error %v, want a fault of kind precondition", i, err)
		}
	}
	for n := range ref {
		if _, err := s.Open(t.Context(), ref[:n]); !errors.Is(err, fault.Precondition) {
			t.Errorf("cut to %d bytes: got error %v, want a fault of kind precondition", n, err)
		}
	}
	ref[0] = refVersion + 1
	_, err = s.Open(t.Context(), ref)
	wantReason(t, err, fault.Precondition, "store_newer")
	wantReason(t, s.Destroy(t.Context(), ref), fault.Precondition, "store_newer")
}

func TestReferenceIsBoundToSealKeyAndTrustDomain(t *testing.T) {
	k, err := NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	_, ref, err := NewSealed(k, example).Create(t.Context(), ECP256)
	if err != nil {
		t.Fatal(err)
	}
	for name, other := range map[string]*Sealed{
		"another seal key":     newSealed(t),
		"another trust domain": NewSealed(k, spiffeid.RequireTrustDomainFromString("example.com")),
	} {
		if _, err := other.Open(t.Context(), ref); fault.ReasonOf(err) != "store_corrupt" {
			t.Errorf("%s: got error %v, want store_corrupt", name, err)
		}
	}
	if _, err := NewSealed(SealKey{}, example).Open(t.Context(), ref); fault.ReasonOf(err) != "seal_key_missing" {
		t.Errorf("no seal key: got error %v, want seal_key_missing", err)
	}
}

// A key that was sealed well, under an id that is not its own: the header
// agrees with the additional data, only the recomputed id tells.
func TestKeyUnderAnotherIDDoesNotOpen(t *testing.T) {
	s := newSealed(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := s.aead()
	if err != nil {
		t.Fatal(err)
	}
	header := append([]byte{refVersion}, make([]byte, idBytes)...)
	ref := aead.Seal(header, nil, plain, s.additional(header))
	_, err = s.Open(t.Context(), ref)
	wantReason(t, err, fault.Precondition, "store_corrupt")
}

func TestIDIsTheHashOfTheKeyInfo(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(spki)
	id, err := ID(key.Public())
	if err != nil || id != hex.EncodeToString(sum[:])[:40] {
		t.Errorf("got %q, %v", id, err)
	}
	if _, err := ID("not a key"); err == nil {
		t.Error("a string has an id")
	}
}

func TestSealKeyFileRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seal.key")
	if err := WriteSealKey(path); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600", info.Mode().Perm())
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	first, err := LoadSealKey(path)
	if err != nil {
		t.Fatal(err)
	}
	second, err := LoadSealKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.MAC("name", []byte("value")), second.MAC("name", []byte("value"))) {
		t.Error("one file gave two keys")
	}
	wantReason(t, WriteSealKey(path), fault.Exists, "seal_key_exists")
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Error("an existing seal key was changed")
	}
}

func TestUnusableSealKeyFileIsRefused(t *testing.T) {
	good := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xa5}, sealKeyBytes))
	for name, content := range map[string]string{
		"empty":         "",
		"short":         base64.StdEncoding.EncodeToString(make([]byte, 31)),
		"long":          base64.StdEncoding.EncodeToString(make([]byte, 33)),
		"not base64":    strings.Repeat("!", 44),
		"large":         strings.Repeat("A", 5000),
		"two keys":      good + "\n" + good,
		"hex":           strings.Repeat("a5", 32),
		"trailing bits": good[:42] + "V=",
	} {
		path := filepath.Join(t.TempDir(), "seal.key")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := LoadSealKey(path)
		if fault.ReasonOf(err) != "seal_key_invalid" {
			t.Errorf("%s: got error %v, want seal_key_invalid", name, err)
		}
		if content != "" && strings.Contains(err.Error(), content) {
			t.Errorf("%s: the error quotes the file", name)
		}
	}
	// NEG-55: a missing key is its own reason.
	_, err := LoadSealKey(filepath.Join(t.TempDir(), "absent"))
	wantReason(t, err, fault.Precondition, "seal_key_missing")

	open := filepath.Join(t.TempDir(), "seal.key")
	if err := os.WriteFile(open, []byte(good), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadSealKey(open); fault.ReasonOf(err) != "path_untrusted" {
		t.Errorf("readable by others: got error %v, want path_untrusted", err)
	}
}

func TestMACCoversNameAndValueApart(t *testing.T) {
	k, err := NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	macs := [][]byte{
		k.MAC("name", []byte("value")), k.MAC("namev", []byte("alue")), k.MAC("name", []byte("valuf")),
		k.MAC("", []byte("namevalue")), k.MAC("namevalue", nil), other.MAC("name", []byte("value")),
	}
	for i, m := range macs {
		if slices.ContainsFunc(macs[:i], func(e []byte) bool { return bytes.Equal(e, m) }) {
			t.Errorf("MAC %d equals an earlier one", i)
		}
	}
}

// I10: whatever prints a seal key, a keeper or a signer, shows none of their
// bytes.
func TestNothingPrintsAKey(t *testing.T) {
	k, err := NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	s := NewSealed(k, example)
	key, ref, err := s.Create(t.Context(), ECP256)
	if err != nil {
		t.Fatal(err)
	}
	opened, err := s.Open(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	private, err := key.(signer).key().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	type holder struct {
		Key      SealKey
		hidden   SealKey
		Signer   crypto.Signer
		unseen   crypto.Signer
		Sealed   *Sealed
		concrete signer
	}
	printed := map[string]any{
		"seal key": k, "pointer": &k, "sealed": s, "sealed value": *s, "signer": key, "opened": opened,
		"holder": holder{k, k, key, opened, s, key.(signer)}, "slice": []any{k, key}, "map": map[string]any{"k": k, "s": key},
	}
	for name, v := range printed {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%b", "%c", "%U"} {
			checkHidden(t, name+" "+verb, fmt.Sprintf(verb, v), k, private)
		}
		if text, err := json.Marshal(v); err == nil {
			checkHidden(t, name+" json", string(text), k, private)
		}
		var buf bytes.Buffer
		slog.New(slog.NewTextHandler(&buf, nil)).LogAttrs(t.Context(), slog.LevelInfo, "m", slog.Any("v", v))
		slog.New(slog.NewJSONHandler(&buf, nil)).LogAttrs(t.Context(), slog.LevelInfo, "m", slog.Any("v", v))
		checkHidden(t, name+" slog", buf.String(), k, private)
	}
}

// checkHidden looks for four consecutive bytes of a secret in every way in
// which printing might write them.
func checkHidden(t *testing.T, what, text string, k SealKey, private []byte) {
	t.Helper()
	folded := strings.ToLower(text)
	for _, secret := range [][]byte{k.secret().wrap, k.secret().mac, private} {
		part := secret[8:12]
		for _, form := range []string{
			string(part), hex.EncodeToString(part),
			fmt.Sprintf("%d %d %d %d", part[0], part[1], part[2], part[3]),
			fmt.Sprintf("%d,%d,%d,%d", part[0], part[1], part[2], part[3]),
			strings.ToLower(fmt.Sprintf("%#v", part)[7:]),
			strings.ToLower(base64.StdEncoding.EncodeToString(secret[9:15])),
		} {
			if strings.Contains(folded, strings.ToLower(form)) {
				t.Errorf("%s shows a secret: %s", what, text)
			}
		}
	}
}

func FuzzOpen(f *testing.F) {
	s := newSealed(f)
	_, ref, err := s.Create(context.Background(), ECP256)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{})
	f.Add(ref[:refHeader])
	f.Add(ref[:len(ref)-1])
	f.Fuzz(func(t *testing.T, changed []byte) {
		if bytes.Equal(changed, ref) {
			return
		}
		if _, err := s.Open(t.Context(), changed); !errors.Is(err, fault.Precondition) {
			t.Fatalf("opened something that was never sealed: %v", err)
		}
	})
}
