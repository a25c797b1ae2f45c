package istioca

import (
	"context"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/kube"
)

var audiences = []string{"istio-ca"}

func encoded(parts ...string) string {
	for i, p := range parts {
		parts[i] = base64.RawURLEncoding.EncodeToString([]byte(p))
	}
	return strings.Join(parts, ".")
}

func incoming(headers ...string) context.Context {
	return metadata.NewIncomingContext(context.Background(), metadata.Pairs(headers...))
}

// NEG-29, NEG-30
func TestTokensNobodyWouldTakeAreNotAskedAbout(t *testing.T) {
	const header, claims = `{"alg":"ES256","kid":"a"}`, `{"iss":"i","sub":"system:serviceaccount:foo:sleep","aud":["x","istio-ca"],"exp":12.5}`
	good := encoded(header, claims, "sig")
	if got, err := bearer(incoming("authorization", "Bearer "+good+"\n"), audiences); err != nil || got != (token{text: good, issuer: "i", expires: 12}) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := bearer(incoming("authorization", "Bearer "+encoded(header, strings.Replace(claims, `["x","istio-ca"]`, `"istio-ca"`, 1), "sig")), audiences); err != nil {
		t.Errorf("one audience, not in a list: %v", err)
	}
	for want, list := range map[string][][]string{
		"bearer_missing":  {{}, {"authorization", ""}, {"authorization", good}, {"authorization", "Bearer "}, {"authorization", "Bearer " + good, "authorization", "Bearer " + good}},
		"token_too_large": {{"authorization", "Bearer " + strings.Repeat(".", 1<<20)}, {"authorization", "Bearer " + strings.Repeat("a", maxToken+1)}},
		"token_malformed": {
			{"authorization", "Bearer " + strings.Repeat(".", maxToken)},
			{"authorization", "Bearer a.b"},
			{"authorization", "Bearer " + good + ".x"},
			{"authorization", "Bearer " + encoded(header, claims) + "."},
			{"authorization", "Bearer " + encoded(header, claims) + ".\xff\xfe"},
			{"authorization", "Bearer " + encoded(header, claims) + ".a b"},
			{"authorization", "Bearer " + encoded(`[]`, claims, "sig")},
			{"authorization", "Bearer " + encoded(header, `{"aud":1}`, "sig")},
			{"authorization", "Bearer " + encoded(header, strings.Repeat("[", 10000), "sig")},
		},
	} {
		for _, headers := range list {
			if _, err := bearer(incoming(headers...), audiences); err == nil || fault.ReasonOf(err) != want {
				t.Errorf("%.60q: %v, want %s", headers, err, want)
			}
		}
	}
}

// CA-09: who is asked about a token.
func TestATokenIsOfOneCluster(t *testing.T) {
	s := &Service{sources: []*source{
		{name: "a", cfg: ClusterConfig{ClusterID: "A", Issuer: "same"}},
		{name: "b", cfg: ClusterConfig{ClusterID: "B", Issuer: "same"}},
		{name: "c", cfg: ClusterConfig{ClusterID: "C", Issuer: "own"}},
	}}
	for _, c := range []struct {
		issuer string
		ids    []string
		want   string
	}{
		{"same", []string{"A"}, "a"},
		{"same", []string{"B"}, "b"},
		{"own", []string{"C"}, "c"},
		{"own", nil, "c"},
		{"own", []string{""}, "c"},
		{"same", nil, "cluster_ambiguous"},
		{"same", []string{"C"}, "cluster_unknown"},
		{"own", []string{"A"}, "cluster_unknown"},
		{"other", nil, "cluster_unknown"},
		{"other", []string{"A"}, "cluster_unknown"},
		{"same", []string{"a"}, "cluster_unknown"},
		{"same", []string{"A", "A"}, "cluster_ambiguous"},
		{"", []string{"A"}, "cluster_unknown"},
	} {
		var headers []string
		for _, id := range c.ids {
			headers = append(headers, "clusterid", id)
		}
		from, err := s.choose(incoming(headers...), c.issuer)
		got := fault.ReasonOf(err)
		if err == nil {
			got = from.name
		}
		if got != c.want {
			t.Errorf("issuer %q, IDs %q: %s, want %s", c.issuer, c.ids, got, c.want)
		}
	}
}

// What gets past is a ServiceAccount's token for us in its only form, whatever the
// bytes. // NEG-30
func FuzzPeek(f *testing.F) {
	f.Add(encoded(`{"alg":"ES256"}`, `{"iss":"i","sub":"system:serviceaccount:foo:sleep","aud":"istio-ca"}`, "sig"))
	f.Add(encoded(`{"alg":"none"}`, `{"sub":"system:serviceaccount:foo:sleep","aud":["istio-ca"]}`, ""))
	f.Add("..")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := peek(text, audiences)
		if err != nil {
			if fault.KindOf(err) != fault.Denied {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		parts := strings.Split(text, ".")
		if len(parts) != 3 || got.text != text || got.expires < 0 {
			t.Fatalf("took %q", text)
		}
		var says struct {
			Subject  string `json:"sub"`
			Audience texts  `json:"aud"`
		}
		if !decode(parts[1], &says) || !slices.Contains(says.Audience, "istio-ca") {
			t.Fatalf("took %q", text)
		}
		if namespace, name, ok := kube.SplitSubject(says.Subject); !ok || fmt.Sprintf("system:serviceaccount:%s:%s", namespace, name) != says.Subject {
			t.Fatalf("took the subject %q", says.Subject)
		}
	})
}
