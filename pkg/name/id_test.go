package name_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
)

// badIDs is the corpus of texts that are no SPIFFE IDs. // NEG-1
var badIDs = map[string]string{
	"empty":                     "",                                                     // ID-1
	"other scheme":              "https://example.org/p",                                // ID-1
	"no authority":              "spiffe:example.org/p",                                 // ID-1
	"no scheme":                 "//example.org/p",                                      // ID-1
	"upper-case scheme":         "SPIFFE://example.org/p",                               // ID-18, D-1
	"leading space":             " spiffe://example.org/p",                              // ID-12
	"empty trust domain":        "spiffe:///p",                                          // ID-2
	"nothing but scheme":        "spiffe://",                                            // ID-2
	"empty query":               "spiffe://example.org/p?",                              // ID-3
	"query":                     "spiffe://example.org/p?a",                             // ID-3
	"empty fragment":            "spiffe://example.org/p#",                              // ID-3
	"fragment":                  "spiffe://example.org/p#a",                             // ID-3
	"query without path":        "spiffe://example.org?a",                               // ID-3
	"user":                      "spiffe://u@example.org/p",                             // ID-4
	"empty user":                "spiffe://@example.org/p",                              // ID-4
	"port":                      "spiffe://example.org:80/p",                            // ID-4
	"empty port":                "spiffe://example.org:/p",                              // ID-4
	"upper-case trust domain":   "spiffe://EXAMPLE.org/p",                               // ID-5, ID-18, D-1
	"encoded trust domain":      "spiffe://ex%61mple.org/p",                             // ID-7
	"IPv6":                      "spiffe://[::1]/p",                                     // ID-8
	"IPv6 with zone":            "spiffe://[fe80::1%25eth0]/p",                          // ID-8, NEG-1
	"Cyrillic trust domain":     "spiffe://ex\u0430mple.org/p",                          // ID-12
	"long trust domain":         "spiffe://" + strings.Repeat("a", 256) + "/p",          // ID-9
	"too long":                  "spiffe://example.org/" + strings.Repeat("a", 2049-21), // ID-11
	"accent":                    "spiffe://example.org/\u00e9",                          // ID-12
	"zero width space":          "spiffe://example.org/a\u200bb",                        // ID-12
	"space":                     "spiffe://example.org/a b",                             // ID-12
	"NUL":                       "spiffe://example.org/a\x00",                           // ID-12
	"backslash":                 `spiffe://example.org/a\b`,                             // ID-12
	"encoded slash":             "spiffe://example.org/a%2Fb",                           // ID-13
	"encoded letter":            "spiffe://example.org/%66oo",                           // ID-13
	"encoded dot":               "spiffe://example.org/%2e/a",                           // ID-13
	"empty segment":             "spiffe://example.org/a//b",                            // ID-14
	"dot segment":               "spiffe://example.org/./a",                             // ID-14
	"dot dot segment":           "spiffe://example.org/a/..",                            // ID-14
	"dot dot in the middle":     "spiffe://example.org/a/../b",                          // ID-14
	"root with slash":           "spiffe://example.org/",                                // ID-15
	"trailing slash":            "spiffe://example.org/a/",                              // ID-15
	"tilde":                     "spiffe://example.org/~a",                              // ID-16
	"colon in path":             "spiffe://example.org/a:b",                             // ID-16
	"plus, comma, bang":         "spiffe://example.org/a+,!",                            // ID-16
	"empty label":               "spiffe://a..b/p",                                      // ID-29
	"leading dot":               "spiffe://.a/p",                                        // ID-29
	"trailing dot":              "spiffe://a./p",                                        // ID-29
	"line feed at the end":      "spiffe://example.org/a\n",                             // ID-12
	"invalid UTF-8 in the path": "spiffe://example.org/a\xff\xfe/",                      // ID-12
}

func TestParseIDRefusesWhatIsNoID(t *testing.T) {
	for what, text := range badIDs {
		_, err := name.ParseID(text)
		if fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != "spiffe_id_invalid" {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if len(text) > 9 && strings.Contains(fault.SafeText(err), text) {
			t.Errorf("%s: the text repeats the input: %v", what, err)
		}
	}
}

func TestParseIDAcceptsEveryID(t *testing.T) {
	for _, text := range []string{
		"spiffe://example.org",                                         // ID-15
		"spiffe://example.org/p",                                       // ID-1
		"spiffe://1.2.3.4/p", "spiffe://a_b/p", "spiffe://x.example/p", // ID-8
		"spiffe://" + strings.Repeat("a", 255) + "/p",                                      // ID-9
		"spiffe://example.org/" + strings.Repeat("a", 2048-21),                             // ID-10
		"spiffe://example.org/...", "spiffe://example.org/.x", "spiffe://example.org/a..b", // ID-14
		"spiffe://example.org/Foo", "spiffe://example.org/9eebccd2-12bf-40a6-b262-65fe0487d453", // ID-17, ID-19
	} {
		got, err := name.ParseID(text)
		if err != nil || got.String() != text {
			t.Errorf("%.80s: %v, %v", text, got, err)
		}
	}
}

func TestParseIDAlphabets(t *testing.T) { // CLIENT-17
	const host = "abcdefghijklmnopqrstuvwxyz0123456789.-_"
	for c := range 256 {
		b := string([]byte{byte(c)})
		_, err := name.ParseID("spiffe://a" + b + "b/p")
		if b == "/" { // it ends the trust domain
			continue
		}
		if (err == nil) != strings.Contains(host, b) { // ID-6
			t.Errorf("byte %#x in the trust domain: %v", c, err)
		}
		_, err = name.ParseID("spiffe://example.org/a" + b + "b")
		if (err == nil) != strings.Contains(host+"ABCDEFGHIJKLMNOPQRSTUVWXYZ/", b) { // ID-16
			t.Errorf("byte %#x in the path: %v", c, err)
		}
	}
}

// What is accepted is what go-spiffe accepts, less the lengths and the empty
// labels. // ID-30
func FuzzParseID(f *testing.F) {
	for _, text := range badIDs {
		f.Add(text)
	}
	f.Add("spiffe://example.org/ns/default/sa/web")
	f.Fuzz(func(t *testing.T, text string) {
		ours, err := name.ParseID(text)
		theirs, theirErr := spiffeid.FromString(text)
		if err == nil {
			if theirErr != nil || ours != theirs || ours.String() != text || len(text) > 2048 {
				t.Fatalf("%q: accepted as %v, go-spiffe says %v", text, ours, theirErr)
			}
			return
		}
		if !errors.Is(err, fault.Invalid) {
			t.Fatalf("%q: %v", text, err)
		}
		if theirErr != nil {
			return
		}
		domain := theirs.TrustDomain().Name()
		narrower := len(text) > 2048 || len(domain) > 255 || strings.Contains("."+domain+".", "..")
		if !narrower {
			t.Fatalf("%q: go-spiffe accepts, we say %v", text, err)
		}
	})
}
