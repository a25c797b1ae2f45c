// Package selector has the facts that attestation produces and entries ask
// for: "unix:uid:1000" is the selector of type "unix" and value "uid:1000".
package selector

import (
	"slices"
	"strings"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Lengths that SPIRE's stores and ours accept, in bytes.
const (
	MaxType  = 64
	MaxValue = 1024
)

// Selector is one fact about a node or a workload.
type Selector struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

// String returns "type:value".
func (s Selector) String() string { return s.Type + ":" + s.Value }

// Check says whether s can be stored: a type without a colon and a value, both
// non-empty and within their lengths, without control characters.
func (s Selector) Check() error {
	switch {
	case s.Type == "" || s.Value == "":
		return fault.New(fault.Invalid, "selector_invalid", "a selector needs a type and a value, as in unix:uid:1000")
	case strings.Contains(s.Type, ":"):
		return fault.New(fault.Invalid, "selector_invalid", "a selector's type holds no colon")
	case len(s.Type) > MaxType:
		return fault.Newf(fault.Invalid, "selector_invalid", "a selector's type has at most %d bytes", MaxType)
	case len(s.Value) > MaxValue:
		return fault.Newf(fault.Invalid, "selector_invalid", "a selector's value has at most %d bytes", MaxValue)
	case strings.ContainsFunc(s.Type+s.Value, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fault.New(fault.Invalid, "selector_invalid", "a selector holds no control characters")
	}
	return nil
}

// Parse reads "type:value"; the value may hold further colons.
func Parse(text string) (Selector, error) {
	typ, value, ok := strings.Cut(text, ":")
	if !ok {
		return Selector{}, fault.New(fault.Invalid, "selector_invalid", "a selector is written type:value, as in unix:uid:1000")
	}
	s := Selector{Type: typ, Value: value}
	if err := s.Check(); err != nil {
		return Selector{}, err
	}
	return s, nil
}

// Set is selectors in canonical order without repetition. Make it with NewSet.
type Set []Selector

// NewSet returns the canonical set of the given selectors.
func NewSet(list ...Selector) Set {
	s := slices.Clone(list)
	slices.SortFunc(s, compare)
	return slices.Compact(s)
}

func compare(a, b Selector) int {
	if c := strings.Compare(a.Type, b.Type); c != 0 {
		return c
	}
	return strings.Compare(a.Value, b.Value)
}

// Contains says whether every selector of sub is in s.
func (s Set) Contains(sub Set) bool {
	for i := 0; len(sub) > 0; i++ {
		if i == len(s) {
			return false
		}
		switch c := compare(s[i], sub[0]); {
		case c == 0:
			sub = sub[1:]
		case c > 0:
			return false
		}
	}
	return true
}

// Key returns one string that is equal for equal sets and for no others.
func (s Set) Key() string {
	var b strings.Builder
	for _, sel := range s {
		b.WriteString(sel.Type)
		b.WriteByte(0)
		b.WriteString(sel.Value)
		b.WriteByte(0)
	}
	return b.String()
}
