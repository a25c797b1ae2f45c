package main

import (
	"fmt"
	"regexp"
	"strconv"
)

// An id names one requirement, such as X509-12.
type id struct {
	prefix string
	number int
}

func (i id) String() string { return fmt.Sprintf("%s-%d", i.prefix, i.number) }

// A span is what a comment names at once: one id, or all from the first to the
// last.
type span struct{ first, last id }

func (s span) String() string {
	if s.first == s.last {
		return s.first.String()
	}
	return fmt.Sprintf("%s..%d", s.first, s.last.number)
}

func (s span) ids() []id {
	var all []id
	for n := s.first.number; n <= s.last.number; n++ {
		all = append(all, id{s.first.prefix, n})
	}
	return all
}

var (
	idPattern = regexp.MustCompile(`\b(ID|X509|JWT|WIT|BUN|WL|FED|BRK|CODE|CLIENT|D|PLAN|NEG|SDS|CA|ZT|IS)-(\d+)\b`)
	// What may follow an id: the end of a range, or another number of its kind.
	rangePattern = regexp.MustCompile(`^(?:\.\.| to )(?:([A-Z][A-Z0-9]*)-)?(\d+)\b`)
	alsoPattern  = regexp.MustCompile(`^, ?(\d+)\b`)
)

// mentions finds the ids in a text: "WL-3", "WL-3, 4, 7", "WL-3..5" and
// "WL-3 to WL-5".
func mentions(text string) []span {
	var found []span
	for {
		at := idPattern.FindStringSubmatchIndex(text)
		if at == nil {
			return found
		}
		prefix := text[at[2]:at[3]]
		first := id{prefix, number(text[at[4]:at[5]])}
		text = text[at[1]:]
		for {
			last := first
			if m := rangePattern.FindStringSubmatch(text); m != nil && (m[1] == "" || m[1] == prefix) {
				last.number = number(m[2])
				text = text[len(m[0]):]
			}
			found = append(found, span{first, last})
			m := alsoPattern.FindStringSubmatch(text)
			if m == nil {
				break
			}
			first.number = number(m[1])
			text = text[len(m[0]):]
		}
	}
}

func number(digits string) int {
	n, err := strconv.Atoi(digits)
	if err != nil {
		return -1 // too long to be one of ours: it has no row
	}
	return n
}
