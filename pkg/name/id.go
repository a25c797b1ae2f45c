// Package name owns what a SPIFFE ID may be: the SPIFFE-ID standard's sections
// 2 (form), 2.1 (trust domain), 2.2 (path) and 2.3 (lengths). It trusts no
// text, and is the only reader of IDs that come from outside.
package name

import (
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Longest SPIFFE ID and longest trust domain name, in bytes (SPIFFE-ID
// section 2.3).
const (
	MaxIDLength          = 2048
	MaxTrustDomainLength = 255
)

// ParseID reads a SPIFFE ID from its raw bytes, strictly: nothing is decoded,
// folded or normalised, so that two different texts are never one identity
// (SPIFFE-ID section 2). The fault is Invalid, "spiffe_id_invalid", and its
// text is the rule that is broken; it never repeats the input.
//
// It accepts less than go-spiffe: lengths are held, and so is a trust domain
// with an empty label ("a..b"), which crypto/x509 would refuse in a
// certificate.
func ParseID(text string) (spiffeid.ID, error) {
	rest, ok := strings.CutPrefix(text, "spiffe://")
	switch {
	case !ok:
		return spiffeid.ID{}, invalidID("a SPIFFE ID starts with spiffe://, in lower case")
	case len(text) > MaxIDLength:
		return spiffeid.ID{}, invalidID("a SPIFFE ID has at most 2048 bytes")
	}
	domain, path := rest, ""
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		domain, path = rest[:i], rest[i:]
	}
	if err := checkTrustDomain(domain); err != nil {
		return spiffeid.ID{}, err
	}
	if err := checkPath(path); err != nil {
		return spiffeid.ID{}, err
	}
	id, err := spiffeid.FromString(text)
	if err != nil {
		return spiffeid.ID{}, fault.Wrap(fault.Invalid, err, "spiffe_id_invalid", "this is not a SPIFFE ID")
	}
	return id, nil
}

func checkTrustDomain(name string) error {
	switch {
	case name == "":
		return invalidID("the trust domain is missing after spiffe://")
	case len(name) > MaxTrustDomainLength:
		return invalidID("a trust domain has at most 255 bytes")
	}
	for i := range len(name) {
		c := name[i]
		if !lower(c) && !digit(c) && c != '.' && c != '-' && c != '_' {
			return invalidID("a trust domain holds only a-z, 0-9, dot, dash and underscore: no user, no port, no upper case")
		}
	}
	if name[0] == '.' || name[len(name)-1] == '.' || strings.Contains(name, "..") {
		return invalidID("the trust domain has an empty label: a dot at an end, or two together")
	}
	return nil
}

func checkPath(path string) error {
	if path == "" {
		return nil
	}
	for segment := range strings.SplitSeq(path[1:], "/") {
		switch segment {
		case "":
			return invalidID("the path has an empty segment or ends with a slash")
		case ".", "..":
			return invalidID("the path has a segment . or ..")
		}
		for i := range len(segment) {
			c := segment[i]
			if !lower(c) && !upper(c) && !digit(c) && c != '.' && c != '-' && c != '_' {
				return invalidID("a path holds only a-z, A-Z, 0-9, dot, dash and underscore: no query, no fragment, no percent-encoding")
			}
		}
	}
	return nil
}

func lower(c byte) bool { return 'a' <= c && c <= 'z' }
func upper(c byte) bool { return 'A' <= c && c <= 'Z' }
func digit(c byte) bool { return '0' <= c && c <= '9' }

func invalidID(rule string) error {
	return fault.New(fault.Invalid, "spiffe_id_invalid", rule)
}
