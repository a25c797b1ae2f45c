package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/seed-caa81108/assay/pkg/daemon"
)

// format is the value of -o.
type format string

const (
	formatText format = "text"
	formatJSON format = "json"
)

// String, Set and Type make format a flag with a closed set of values.
func (f *format) String() string { return string(*f) }

func (f *format) Set(s string) error {
	switch v := format(s); v {
	case formatText, formatJSON:
		*f = v
		return nil
	}
	return errors.New("want text or json")
}

func (f *format) Type() string { return "text|json" }

// print writes doc as JSON, or calls text, by -o.
func (t *tool) print(doc any, text func(io.Writer) error) error {
	if t.format == formatJSON {
		return t.printJSON(doc)
	}
	return text(t.stdout)
}

// printJSON writes one document on one line: what scripts read line by line,
// and what jq makes pretty.
func (t *tool) printJSON(doc any) error { return writeJSON(t.stdout, doc) }

func writeJSON(w io.Writer, doc any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(doc); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// table collects rows and writes them aligned.
type table struct {
	header []string
	rows   [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) write(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range append([][]string{t.header}, t.rows...) {
		if len(row) == 0 {
			continue
		}
		cells := make([]string, len(row))
		for i, c := range row {
			cells[i] = plain(c)
			if cells[i] == "" {
				cells[i] = "-"
			}
		}
		if _, err := io.WriteString(tw, strings.Join(cells, "\t")+"\n"); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	if err := tw.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// plain escapes what could steer a terminal or break a line: the text may come
// from whoever named an entry or runs an agent.
func plain(s string) string {
	if !strings.ContainsFunc(s, unsafe) && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		if r == utf8.RuneError && n == 1 {
			fmt.Fprintf(&b, `\x%02x`, s[0])
		} else if unsafe(r) {
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		} else {
			b.WriteString(s[:n])
		}
		s = s[n:]
	}
	return b.String()
}

func unsafe(r rune) bool { return !unicode.IsPrint(r) }

// oneLine makes sure that an error stays one line whatever it quotes.
func oneLine(s string) string { return plain(strings.TrimRight(s, "\n")) }

// warn prints on standard error what does not change the exit code.
func (t *tool) warn(err error) {
	shape := daemon.Describe(err)
	_, _ = fmt.Fprintln(t.stderr, oneLine("warning: "+shape.Reason+": "+shape.Message)) // with standard error gone nobody can be told
}

// quote is for words of the command line in messages; long ones are cut.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strconv.Quote(s)
}

// stamp is how text output writes a moment.
func stamp(at time.Time) string {
	if at.IsZero() {
		return ""
	}
	return at.UTC().Format(time.RFC3339)
}

// fromUnix reads the seconds that SPIRE's API carries; zero is "never".
func fromUnix(seconds int64) *time.Time {
	if seconds == 0 {
		return nil
	}
	at := time.Unix(seconds, 0).UTC()
	return &at
}

func stampOf(at *time.Time) string {
	if at == nil {
		return ""
	}
	return stamp(*at)
}

// span writes a duration as people say it: the two largest units.
func span(d time.Duration) string {
	if d < 0 {
		return "-" + span(-d)
	}
	const day = 24 * time.Hour
	switch {
	case d >= 3*day:
		return strconv.Itoa(int(d/day)) + "d"
	case d >= day:
		return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	case d >= time.Minute:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	}
	return strconv.Itoa(int(d/time.Second)) + "s"
}

// remaining says how long something still lasts.
func remaining(until, now time.Time) string {
	if left := until.Sub(now); left > 0 {
		return span(left) + " left"
	}
	return "expired"
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// list never is null in JSON.
func list[T any](items []T) []T {
	if items == nil {
		return []T{}
	}
	return items
}
