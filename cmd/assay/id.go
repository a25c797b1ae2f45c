package main

import (
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// parseID reads a SPIFFE ID of the command line; the fault names the rule that
// is broken.
func parseID(flag, text string) (spiffeid.ID, error) {
	if text == "" {
		return spiffeid.ID{}, usageError(flag + " is needed: a SPIFFE ID, such as spiffe://example.org/web")
	}
	rule := "the ID of a trust domain alone is nobody's"
	id, err := name.ParseID(text)
	switch {
	case err != nil:
		rule = fault.SafeText(err)
	case id.Path() != "":
		return id, nil
	}
	return spiffeid.ID{}, fault.New(fault.Invalid, "spiffe_id_invalid", flag+" "+quote(text)+": "+rule+"; give one as spiffe://example.org/web")
}

func idToProto(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// idFromProto writes an ID as it came: a tool that lists does not judge.
func idFromProto(p *types.SPIFFEID) string {
	if p == nil {
		return ""
	}
	return "spiffe://" + p.GetTrustDomain() + p.GetPath()
}

// parseSelectors reads the repeated --selector.
func parseSelectors(texts []string) ([]*types.Selector, error) {
	out := make([]*types.Selector, 0, len(texts))
	for _, text := range texts {
		s, err := selector.Parse(text)
		if err != nil {
			return nil, usageError("--selector " + quote(text) + ": " + fault.SafeText(err))
		}
		out = append(out, &types.Selector{Type: s.Type, Value: s.Value})
	}
	return out, nil
}

func selectorTexts(list []*types.Selector) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = s.GetType() + ":" + s.GetValue()
	}
	return out
}

// seconds reads a flag's duration into the API's whole seconds.
func seconds(flag string, d time.Duration) (int32, error) {
	const most = 1<<31 - 1
	switch s := int64(d / time.Second); {
	case d < 0:
		return 0, usageError(flag + " can't be negative")
	case d%time.Second != 0:
		return 0, usageError(flag + " must be whole seconds")
	case s > most:
		return 0, usageError(flag + " is too long")
	default:
		return int32(s), nil
	}
}

// ttlSeconds reads --ttl.
func ttlSeconds(d time.Duration) (int32, error) { return seconds("--ttl", d) }

// parseMoment reads --expires-at: an RFC 3339 time, or a duration from now.
func parseMoment(flag, text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil {
		if d <= 0 {
			return time.Time{}, usageError(flag + " must lie in the future")
		}
		return now.Add(d), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}, usageError(flag + " must be a time as 2026-12-31T00:00:00Z or a duration as 720h, got " + quote(text))
	}
	if !at.After(now) {
		return time.Time{}, usageError(flag + " must lie in the future")
	}
	return at, nil
}

// itemError reads the status of one item of a batch. Its message is
// "<reason>: <text>", as in every status of ours; a server that sends anything
// else (SPIRE does) gets its kind as the reason.
func itemError(st *types.Status) error {
	if st.GetCode() == 0 {
		return nil
	}
	reason, text, ok := strings.Cut(st.GetMessage(), ": ")
	if !ok || !fault.IsReason(reason) {
		reason, text = "", st.GetMessage()
	}
	return fault.FromItem(st.GetCode(), reason, text)
}
