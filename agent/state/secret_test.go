package state_test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/agent/state"
)

// shown is all that printing, logging and encoding make of v.
func shown(v any) string {
	var out strings.Builder
	for _, verb := range "vTtbcdoOqxXUeEfFgGspw" {
		for _, flag := range []string{"", "+", "#", "-", " ", "0"} {
			fmt.Fprintf(&out, "%"+flag+string(verb)+"\n", v)
		}
	}
	text, err := json.Marshal(v)
	fmt.Fprintln(&out, string(text), err)
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", slog.Any("v", v))
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", slog.Any("v", v))
	return out.String()
}

// traces are the ways in which the beginning of a secret may show.
func traces(secret []byte) []string {
	head := secret[:6]
	list := []string{string(head), hex.EncodeToString(head), strings.ToUpper(hex.EncodeToString(head))}
	for _, form := range []string{"%d", "%+d", "%o", "%b", "% x", "% X", "%#x", "%c", "%U"} {
		list = append(list, strings.Trim(fmt.Sprintf(form, head), "[]"))
	}
	encoded, _ := json.Marshal(head) // 6 bytes: no padding
	return append(list, strings.Trim(string(encoded), `"`))
}

// I10: whatever is done to them for show, secrets don't.
func TestNothingThatPrintsShowsAKey(t *testing.T) {
	s := open(t, t.TempDir())
	defer func() { _ = s.Close() }()
	id := identity(must(s.NextKey()))
	if err := s.SaveIdentity(id); err != nil {
		t.Fatal(err)
	}
	scalar := must(id.Key.Bytes())
	key := must(s.CacheKeys("svids"))[0]
	derived := state.Secret(key)
	for _, trace := range traces(derived) {
		if len(derived) != 32 || !strings.Contains(shown(derived)+string(derived), trace) && !strings.HasPrefix(trace, "U+") {
			t.Fatalf("the test would not see %q", trace)
		}
	}
	for name, v := range map[string]any{
		"cache key": key, "pointer to it": &key, "list of it": []state.CacheKey{key}, "field": struct{ K state.CacheKey }{key},
		"unexported field": struct{ k state.CacheKey }{key}, "pointer in an unexported field": struct{ k *state.CacheKey }{&key},
		"identity": id, "pointer to the identity": &id, "list of the identity": []state.Identity{id}, "identity in a field": struct{ I *state.Identity }{&id},
	} {
		text := shown(v)
		for _, trace := range append(traces(scalar), traces(derived)...) {
			if strings.Contains(text, trace) {
				t.Errorf("%s shows its key: %q", name, trace)
			}
		}
		for _, number := range []string{id.Key.D.String(), id.Key.D.Text(16)} { //nolint:staticcheck // SA1019: it is what printing would show
			if strings.Contains(text, number) {
				t.Errorf("%s shows its key as a number", name)
			}
		}
	}
}

func TestZeroCacheKeyEncryptsNothing(t *testing.T) {
	if _, err := (state.CacheKey{}).AEAD(); err == nil {
		t.Error("a cipher without a key")
	}
	s := open(t, t.TempDir())
	defer func() { _ = s.Close() }()
	if err := s.SaveIdentity(identity(must(s.NextKey()))); err != nil {
		t.Fatal(err)
	}
	key := must(s.CacheKeys("x"))[0]
	if key.Equal(state.CacheKey{}) || (state.CacheKey{}).Equal(key) || !key.Equal(must(s.CacheKeys("x"))[0]) {
		t.Error("wrong about being equal")
	}
}
