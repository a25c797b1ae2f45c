package cache_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/agent/cache"
)

// I10: whatever is done to an SVID for show, its key does not.
func TestNothingThatPrintsShowsAnSVIDsKey(t *testing.T) {
	s := &cache.SVID{ID: spiffeid.RequireFromString("spiffe://example.org/web"), Key: cache.NewPrivateKey([]byte("KEYKEY"))}
	for name, v := range map[string]any{
		"an SVID": s, "a copy": *s, "a list": []*cache.SVID{s}, "a list of copies": []cache.SVID{*s}, "a field": struct{ S *cache.SVID }{s},
		"a copy out of reach": struct{ s cache.SVID }{*s}, "an SVID out of reach": struct{ s *cache.SVID }{s},
	} {
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
		if !strings.Contains(name, "out of reach") && !strings.Contains(out.String(), "spiffe://example.org/web") {
			t.Errorf("%s does not say whose it is", name)
		}
		for _, trace := range []string{"KEYKEY", "4b45594b4559", "4B45594B4559", "4b 45 59", "75 69 89", "0x4b, 0x45", "+75 +69", "S0VZS0VZ", "1001011 1000101", "113 105"} {
			if strings.Contains(out.String(), trace) {
				t.Errorf("%s shows its key: %s", name, trace)
			}
		}
	}
}
