package istioca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func jwk(t testing.TB, kid string, key any) string {
	t.Helper()
	data, err := json.Marshal(jose.JSONWebKey{Key: key, KeyID: kid, Use: "sig"})
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func set(keys ...string) []byte { return []byte(`{"keys":[` + strings.Join(keys, ",") + `]}`) }

// NEG-50: what is taken for keys.
func TestKeySets(t *testing.T) {
	key := ecKey(t)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	good := jwk(t, "a", key.Public())
	many := make([]string, 1000)
	for i := range many {
		many[i] = jwk(t, fmt.Sprint(i), key.Public())
	}
	for name, c := range map[string]struct {
		data []byte
		keys int // zero: refused
	}{
		"one":              {set(good), 1},
		"two":              {set(good, jwk(t, "b", ecKey(t).Public())), 2},
		"twice one name":   {set(good, jwk(t, "a", ecKey(t).Public())), 0},
		"a secret":         {set(`{"kty":"oct","kid":"a","k":"AAAA"}`), 0},
		"beside a secret":  {set(good, `{"kty":"oct","kid":"s","k":"AAAA"}`), 1},
		"a private key":    {set(jwk(t, "a", key)), 0},
		"no name":          {set(jwk(t, "", key.Public())), 0},
		"for encryption":   {set(strings.Replace(good, `"sig"`, `"enc"`, 1)), 0},
		"too short":        {set(jwk(t, "a", weak.Public())), 0},
		"none":             {set(), 0},
		"no set":           {[]byte(`{}`), 0},
		"garbage":          {[]byte(`<html>`), 0},
		"a thousand":       {set(many...), 0},
		"of unknown kinds": {set(good, `{"kty":"new","kid":"n"}`), 1},
	} {
		got, err := parseKeys(c.data)
		if len(got) != c.keys || (err == nil) != (c.keys > 0) {
			t.Errorf("%s: %d keys, %v", name, len(got), err)
		}
	}
}

// NEG-50: keys are used for an hour after the last answer, and then nothing is
// believed; a source is asked twice a minute at most, whatever the tokens name.
func TestKeysThatCannotBeHad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		var away atomic.Bool
		k := &keySet{source: func(context.Context) (map[string]any, error) {
			asked.Add(1)
			if away.Load() {
				return nil, errors.New("away")
			}
			return map[string]any{"a": 1}, nil
		}}
		find := func(kid string) string {
			_, err := k.find(t.Context(), kid)
			if err == nil {
				return ""
			}
			return fault.KindOf(err).Error() + " " + fault.ReasonOf(err)
		}
		away.Store(true)
		if got := find("a"); got != "not_ready jwks_stale" {
			t.Errorf("before the first answer: %s", got)
		}
		if got := find("a"); got != "not_ready jwks_stale" || asked.Load() != 1 {
			t.Errorf("again: %s, asked %d times", got, asked.Load())
		}
		away.Store(false)
		time.Sleep(keysAtMost)
		if got := find("a"); got != "" {
			t.Errorf("with an answer: %s", got)
		}
		before := asked.Load()
		for i := range 1000 { // a storm of names
			if got := find(fmt.Sprint("new-", i)); got != "not_ready jwks_stale" { // it may be as new as that
				t.Fatalf("a name that is not known: %s", got)
			}
		}
		if n := asked.Load() - before; n != 0 {
			t.Errorf("asked %d times just after an answer", n)
		}
		time.Sleep(keysAtMost)
		if got := find("new"); got != "denied token_invalid" {
			t.Errorf("a name that the source does not have: %s", got)
		}
		away.Store(true)
		time.Sleep(keysLast - keysAtMost)
		if got := find("a"); got != "" {
			t.Errorf("almost an hour after the last answer: %s", got)
		}
		if got := find("new"); got != "not_ready jwks_stale" {
			t.Errorf("a name that may be new: %s", got)
		}
		time.Sleep(2 * keysAtMost)
		if got := find("a"); got != "not_ready jwks_stale" {
			t.Errorf("after an hour: %s", got)
		}
		away.Store(false)
		time.Sleep(keysAtMost)
		if got := find("a"); got != "" {
			t.Errorf("when it is back: %s", got)
		}
	})
}

func TestKeysAreKeptCurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked, told atomic.Int32
		k := &keySet{source: func(context.Context) (map[string]any, error) {
			if n := asked.Add(1); n%2 == 0 {
				return nil, errors.New("away")
			}
			return map[string]any{"a": 1}, nil
		}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		k.run(ctx, func(err error) {
			if err != nil {
				told.Add(1)
			}
		})
		if n := asked.Load(); n < 20 || n > 25 || told.Load() < n/2-1 {
			t.Errorf("asked %d times in an hour, told of %d failures", n, told.Load())
		}
	})
}

// NEG-50: over TLS that is verified, and from who was asked alone.
func TestKeysOverHTTPS(t *testing.T) {
	key := ecKey(t)
	mux := http.NewServeMux()
	mux.HandleFunc("/jwks", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(set(jwk(t, "a", key.Public()))) })
	mux.Handle("/redirect", http.RedirectHandler("/jwks", http.StatusFound))
	mux.HandleFunc("/large", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"keys":[],"x":"` + strings.Repeat("x", maxKeySet) + `"}`))
	})
	srv := httptest.NewTLSServer(mux)
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		path, ca string
		ok       bool
	}{
		"good": {"/jwks", ca, true}, "redirected": {"/redirect", ca, false}, "missing": {"/nothing", ca, false},
		"too large": {"/large", ca, false}, "of nobody we know": {"/jwks", "", false},
	} {
		k, err := newKeySet("x", OIDCConfig{JWKSURL: srv.URL + c.path, CAFile: c.ca})
		if err != nil {
			t.Fatal(err)
		}
		got, err := k.find(t.Context(), "a")
		if (err == nil) != c.ok || (err != nil && fault.ReasonOf(err) != "jwks_stale") {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	for name, c := range map[string]OIDCConfig{
		"no CA file": {JWKSURL: srv.URL, CAFile: ca + ".missing"}, "no key file": {JWKSFile: ca + ".missing"}, "not keys": {JWKSFile: ca},
	} {
		if _, err := newKeySet("x", c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
