package istioca

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"

	"google.golang.org/grpc/metadata"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/kube"
)

// maxToken is the longest token that is looked at: a projected one has about
// 1 KB.
const maxToken = 16 << 10

// What a token can be signed with. Whoever verifies it has the last word; this
// keeps out what no verifier should have to look at.
var algorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"}

// refused is fault.Denied with the true reason, for the log: callers hear
// errNotAuthenticated.
func refused(reason, text string) error { return fault.New(fault.Denied, reason, text) }

// notAuthenticated is what callers hear, in Istio's words.
func notAuthenticated(cause error) error {
	return fault.Wrap(fault.Unauthenticated, cause, "authentication_failed", "request authenticate failure")
}

// token is what a request carries, and says of itself: nothing of that is proved.
type token struct {
	text    string
	issuer  string
	expires int64 // Unix seconds; zero: it does not say
}

// bearer takes the token out of a request. What no verifier would take is refused
// here, before anybody is asked: it is not one token, has not the form of one, or
// is not a ServiceAccount's for one of the audiences.
func bearer(ctx context.Context, audiences []string) (token, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	if len(values) != 1 {
		return token{}, refused("bearer_missing", "there is no authorization header, or more than one")
	}
	text, ok := strings.CutPrefix(values[0], "Bearer ")
	// ztunnel sends its file as it is.
	if text = strings.TrimSpace(text); !ok || text == "" {
		return token{}, refused("bearer_missing", "the authorization header has no bearer token")
	}
	if len(text) > maxToken {
		return token{}, refused("token_too_large", "the token is longer than any that is looked at")
	}
	return peek(text, audiences)
}

// peek reads what a token says of itself.
func peek(text string, audiences []string) (token, error) {
	malformed := refused("token_malformed", "the token is no JSON Web Token of a ServiceAccount")
	parts := strings.SplitN(text, ".", 4)
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return token{}, malformed
	}
	var header struct {
		Algorithm string           `json:"alg"`
		Critical  *json.RawMessage `json:"crit"`
		Zip       *json.RawMessage `json:"zip"`
		Enc       *json.RawMessage `json:"enc"`
	}
	if !decode(parts[0], &header) || header.Critical != nil || header.Zip != nil || header.Enc != nil || !slices.Contains(algorithms, header.Algorithm) {
		return token{}, malformed
	}
	var says struct {
		Issuer   string  `json:"iss"`
		Subject  string  `json:"sub"`
		Audience texts   `json:"aud"`
		Expires  float64 `json:"exp"`
	}
	if !decode(parts[1], &says) {
		return token{}, malformed
	}
	// Nobody could verify it, and an API server need not be able to read it.
	if _, err := base64.RawURLEncoding.Strict().DecodeString(parts[2]); err != nil {
		return token{}, malformed
	}
	if _, _, ok := kube.SplitSubject(says.Subject); !ok {
		return token{}, refused("no_service_account", "the token is no ServiceAccount's")
	}
	if !slices.ContainsFunc(says.Audience, func(a string) bool { return slices.Contains(audiences, a) }) {
		return token{}, refused("audience", "the token is not for one of istio.audiences: "+strings.Join(audiences, ", "))
	}
	return token{text: text, issuer: says.Issuer, expires: int64(min(max(says.Expires, 0), 1<<53))}, nil
}

func decode(part string, into any) bool {
	data, err := base64.RawURLEncoding.Strict().DecodeString(part)
	return err == nil && json.Unmarshal(data, into) == nil
}

// texts is a claim that is one text or a list of them.
type texts []string

// UnmarshalJSON implements json.Unmarshaler.
func (t *texts) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*t = texts{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(t))
}

// choose returns the cluster that a token is of: the only one whose tokens have
// its issuer and that has the ID which the caller says, as far as either is said.
// It decides who is asked; what it is worth, they say.
func (s *Service) choose(ctx context.Context, issuer string) (*source, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	ids := md.Get("clusterid")
	if len(ids) > 1 {
		return nil, refused("cluster_ambiguous", "there is more than one clusterid header")
	}
	id := strings.Join(ids, "")
	var found *source
	for _, c := range s.sources {
		if c.cfg.Issuer != "" && c.cfg.Issuer != issuer || id != "" && c.cfg.ClusterID != id {
			continue
		}
		if found != nil {
			return nil, refused("cluster_ambiguous", "the token could be of several clusters: have proxies send clusterid, or set istio.clusters.<name>.issuer")
		}
		found = c
	}
	if found == nil {
		return nil, refused("cluster_unknown", "no cluster of istio.clusters has the token's issuer and the clusterid that was sent")
	}
	return found, nil
}
