package audit

import (
	"encoding/hex"
	"strconv"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	// maxField bounds one string of a line. It holds the longest SPIFFE ID
	// whole (2048 bytes).
	maxField = 2048
	// maxLine bounds a whole line: every string at its bound and every byte of
	// it escaped stays below.
	maxLine = 360 << 10
)

// encoder appends JSON object members. It is the allow-list of the log: it
// knows strings and numbers, and appendLine names each of them.
type encoder struct {
	buf   []byte
	comma bool
}

// appendLine appends the members of one line that its caller provides. What the
// writer provides (number, hash, times, build) is not known yet.
func appendLine(buf []byte, l *Line) []byte {
	e := encoder{buf: buf, comma: true} // the writer's members come first
	e.str("request_id", l.Origin.RequestID)
	e.actor(l.Origin.Actor)
	e.str("from", l.Origin.From)
	e.str("action", l.Action)
	if t := l.Target; t != (Target{}) {
		e.begin("target")
		e.str("spiffe_id", t.SPIFFEID)
		e.str("parent_id", t.ParentID)
		e.str("entry_id", t.EntryID)
		if t.EntryID != "" {
			e.num("entry_rev", t.EntryRevision)
		}
		e.str("agent_id", t.AgentID)
		e.str("authority_id", t.AuthorityID)
		e.str("operation_id", t.OperationID)
		e.end()
	}
	if w := l.Why; w != (Why{}) {
		e.begin("why")
		e.str("rule", w.Rule)
		e.str("selectors_hash", w.SelectorsHash)
		e.str("operator_reason", w.Reason)
		e.end()
	}
	e.begin("result")
	e.str("code", l.Result.Code)
	e.str("reason", l.Result.Reason)
	e.str("cause", l.Result.Cause)
	e.end()
	if c := l.Cert; c != nil {
		e.begin("cert")
		e.str("serial", c.Serial)
		e.str("spki_sha256", c.SPKISHA256)
		e.time("not_before", c.NotBefore)
		e.time("not_after", c.NotAfter)
		e.str("issuer_ski", c.IssuerSKI)
		e.end()
	}
	return e.buf
}

func (e *encoder) actor(a Actor) {
	e.begin("actor")
	e.str("kind", a.Kind)
	if a.UID != nil {
		e.num("uid", int64(*a.UID))
	}
	if a.GID != nil {
		e.num("gid", int64(*a.GID))
	}
	if a.PID != 0 {
		e.num("pid", int64(a.PID))
	}
	e.str("exe", a.Exe)
	e.str("spiffe_id", a.SPIFFEID)
	e.str("serial", a.Serial)
	if k := a.Kubernetes; k != nil {
		e.begin("kubernetes")
		e.str("cluster", k.Cluster)
		e.str("namespace", k.Namespace)
		e.str("service_account", k.ServiceAccount)
		e.str("pod", k.Pod)
		e.str("pod_uid", k.PodUID)
		e.str("node", k.Node)
		e.end()
	}
	e.end()
}

// stamp is what the writer adds to a line.
type stamp struct {
	seq  uint64
	prev digest
	wall time.Time
	mono time.Duration
	// revision is one that the store has reached; zero: none is known.
	revision int64
}

// appendHead opens a line with the writer's members.
func appendHead(buf []byte, s stamp) []byte {
	buf = append(buf, `{"seq":`...)
	buf = strconv.AppendUint(buf, s.seq, 10)
	buf = append(buf, `,"prev_hash":"`...)
	buf = hex.AppendEncode(buf, s.prev[:])
	buf = append(buf, `","time_wall":"`...)
	buf = s.wall.UTC().AppendFormat(buf, time.RFC3339Nano)
	buf = append(buf, `","time_mono":`...)
	buf = strconv.AppendInt(buf, int64(s.mono), 10)
	if s.revision > 0 {
		buf = append(buf, `,"store_revision":`...)
		buf = strconv.AppendInt(buf, s.revision, 10)
	}
	return buf
}

// appendTail closes a line, its newline not included.
func appendTail(buf []byte, build string) []byte {
	e := encoder{buf: buf, comma: true}
	e.str("build_id", build)
	return append(e.buf, `,"audit":true}`...)
}

func (e *encoder) key(k string) {
	if e.comma {
		e.buf = append(e.buf, ',')
	}
	e.comma = true
	e.buf = append(e.buf, '"')
	e.buf = append(e.buf, k...)
	e.buf = append(e.buf, '"', ':')
}

func (e *encoder) begin(k string) {
	e.key(k)
	e.buf = append(e.buf, '{')
	e.comma = false
}

func (e *encoder) end() {
	e.buf = append(e.buf, '}')
	e.comma = true
}

func (e *encoder) num(k string, v int64) {
	e.key(k)
	e.buf = strconv.AppendInt(e.buf, v, 10)
}

// str leaves empty strings out: no field is not the same as an empty one, and
// the log has no empty ones.
func (e *encoder) str(k, v string) {
	if v == "" {
		return
	}
	e.key(k)
	e.buf = append(e.buf, '"')
	e.buf = appendText(e.buf, v)
	e.buf = append(e.buf, '"')
}

func (e *encoder) time(k string, t time.Time) {
	if t.IsZero() {
		return
	}
	e.key(k)
	e.buf = append(e.buf, '"')
	e.buf = t.UTC().AppendFormat(e.buf, time.RFC3339)
	e.buf = append(e.buf, '"')
}

// appendText appends s as the inside of a JSON string, cut at maxField. What a
// terminal could act upon (control and direction characters, C1 included) is
// escaped, so that a line shows what it holds; a broken byte becomes U+FFFD.
func appendText(buf []byte, s string) []byte {
	const mark = "…"
	cut := false
	if len(s) > maxField {
		end := maxField
		for end > maxField-utf8.UTFMax && !utf8.RuneStart(s[end]) {
			end--
		}
		s, cut = s[:end], true
	}
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			buf = append(buf, '\\', byte(r))
		case r >= ' ' && r < utf8.RuneSelf-1:
			buf = append(buf, byte(r))
		case unicode.IsPrint(r):
			buf = utf8.AppendRune(buf, r)
		case r > 0xffff:
			hi, lo := utf16.EncodeRune(r)
			buf = appendEscape(appendEscape(buf, hi), lo)
		default:
			buf = appendEscape(buf, r)
		}
	}
	if cut {
		buf = append(buf, mark...)
	}
	return buf
}

func appendEscape(buf []byte, r rune) []byte {
	const digits = "0123456789abcdef"
	return append(buf, '\\', 'u', digits[r>>12&15], digits[r>>8&15], digits[r>>4&15], digits[r&15])
}
