package audit

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// parsed is a line as an investigator's program reads it.
type parsed struct {
	Seq       uint64    `json:"seq"`
	PrevHash  string    `json:"prev_hash"`
	TimeWall  time.Time `json:"time_wall"`
	TimeMono  int64     `json:"time_mono"`
	RequestID string    `json:"request_id"`
	Actor     struct {
		Kind     string  `json:"kind"`
		UID      *uint32 `json:"uid"`
		GID      *uint32 `json:"gid"`
		PID      int32   `json:"pid"`
		Exe      string  `json:"exe"`
		SPIFFEID string  `json:"spiffe_id"`
		Serial   string  `json:"serial"`

		Kubernetes *struct {
			Cluster        string `json:"cluster"`
			Namespace      string `json:"namespace"`
			ServiceAccount string `json:"service_account"`
			Pod            string `json:"pod"`
			PodUID         string `json:"pod_uid"`
			Node           string `json:"node"`
		} `json:"kubernetes"`
	} `json:"actor"`
	From   string `json:"from"`
	Action string `json:"action"`
	Target struct {
		SPIFFEID    string `json:"spiffe_id"`
		ParentID    string `json:"parent_id"`
		EntryID     string `json:"entry_id"`
		EntryRev    int64  `json:"entry_rev"`
		AgentID     string `json:"agent_id"`
		AuthorityID string `json:"authority_id"`
		OperationID string `json:"operation_id"`
	} `json:"target"`
	Why struct {
		Rule           string `json:"rule"`
		SelectorsHash  string `json:"selectors_hash"`
		OperatorReason string `json:"operator_reason"`
	} `json:"why"`
	Result struct {
		Code   string `json:"code"`
		Reason string `json:"reason"`
		Cause  string `json:"cause"`
	} `json:"result"`
	Cert *struct {
		Serial     string    `json:"serial"`
		SPKI       string    `json:"spki_sha256"`
		NotBefore  time.Time `json:"not_before"`
		NotAfter   time.Time `json:"not_after"`
		IssuerSKID string    `json:"issuer_ski"`
	} `json:"cert"`
	BuildID string `json:"build_id"`
	Audit   bool   `json:"audit"`
}

func parse(t *testing.T, line []byte) parsed {
	t.Helper()
	var p parsed
	dec := json.NewDecoder(strings.NewReader(string(line)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&p); err != nil {
		t.Fatalf("not the documented JSON: %v\n%s", err, line)
	}
	return p
}

func encode(l *Line) []byte {
	buf := appendHead(nil, stamp{seq: 7, wall: time.Unix(1e9, 5), mono: 42})
	return appendTail(appendLine(buf, l), "build")
}

// fullLine has something in every field.
func fullLine() Line {
	uid, gid := uint32(0), uint32(4294967295)
	return Line{
		Origin: Origin{RequestID: "01R", From: "10.0.0.9:4711", Actor: Actor{
			Kind: "operator", UID: &uid, GID: &gid, PID: 17, Exe: "/usr/bin/assay",
			SPIFFEID: "spiffe://example.org/op", Serial: "0a0b",
			Kubernetes: &Kubernetes{Cluster: "prod", Namespace: "foo", ServiceAccount: "sleep", Pod: "sleep-1", PodUID: "uid-1", Node: "node-1"},
		}},
		Action: "x509_sign",
		Target: Target{SPIFFEID: "spiffe://example.org/a", ParentID: "spiffe://example.org/node", EntryID: "e1", EntryRevision: 3, AgentID: "spiffe://example.org/agent", AuthorityID: "aa", OperationID: "op1"},
		Why:    Why{Rule: "entry", SelectorsHash: "5e", Reason: "ticket 12"},
		Result: Result{Code: "denied", Reason: "agent_banned", Cause: "chain_untrusted"},
		Cert:   &Cert{Serial: "cc", SPKISHA256: "dd", NotBefore: time.Unix(100, 0), NotAfter: time.Unix(200, 0), IssuerSKI: "ee"},
	}
}

func TestLineHoldsEveryField(t *testing.T) {
	l := fullLine()
	p := parse(t, encode(&l))
	if p.Seq != 7 || p.PrevHash != strings.Repeat("0", 64) || !p.TimeWall.Equal(time.Unix(1e9, 5)) || p.TimeMono != 42 || p.BuildID != "build" || !p.Audit {
		t.Errorf("the writer's members: %+v", p)
	}
	a := p.Actor
	if a.Kind != "operator" || *a.UID != 0 || *a.GID != 4294967295 || a.PID != 17 || a.Exe != "/usr/bin/assay" || a.SPIFFEID != "spiffe://example.org/op" || a.Serial != "0a0b" {
		t.Errorf("actor: %+v", a)
	}
	if k := a.Kubernetes; k == nil || k.Cluster != "prod" || k.Namespace != "foo" || k.ServiceAccount != "sleep" || k.Pod != "sleep-1" || k.PodUID != "uid-1" || k.Node != "node-1" {
		t.Errorf("actor in Kubernetes: %+v", k)
	}
	if p.RequestID != "01R" || p.From != "10.0.0.9:4711" || p.Action != "x509_sign" {
		t.Errorf("origin and action: %+v", p)
	}
	g := p.Target
	if g.SPIFFEID != "spiffe://example.org/a" || g.EntryID != "e1" || g.EntryRev != 3 || g.AgentID != "spiffe://example.org/agent" || g.AuthorityID != "aa" || g.OperationID != "op1" {
		t.Errorf("target: %+v", g)
	}
	if p.Why.Rule != "entry" || p.Why.SelectorsHash != "5e" || p.Why.OperatorReason != "ticket 12" {
		t.Errorf("why: %+v", p.Why)
	}
	if p.Result.Code != "denied" || p.Result.Reason != "agent_banned" || p.Result.Cause != "chain_untrusted" {
		t.Errorf("result: %+v", p.Result)
	}
	if c := p.Cert; c == nil || c.Serial != "cc" || c.SPKI != "dd" || c.NotBefore.Unix() != 100 || c.NotAfter.Unix() != 200 || c.IssuerSKID != "ee" {
		t.Errorf("cert: %+v", p.Cert)
	}
}

func TestEmptyLineIsStillALine(t *testing.T) {
	p := parse(t, encode(&Line{}))
	if p.Seq != 7 || p.Cert != nil || p.Actor.UID != nil {
		t.Errorf("%+v", p)
	}
}

// NEG-18: what could carry a secret by accident (bytes, maps, errors, any) has
// no way into a line, and a new field is not printed unless it is named here.
func TestOnlyDeclaredPlainFieldsExist(t *testing.T) {
	var fields int
	var walk func(reflect.Type, string)
	walk = func(typ reflect.Type, path string) {
		if typ.Kind() == reflect.Pointer {
			typ = typ.Elem()
		}
		switch {
		case typ == reflect.TypeFor[time.Time]():
			fields++
		case typ.Kind() == reflect.Struct:
			for f := range typ.Fields() {
				walk(f.Type, path+"."+f.Name)
			}
		case typ.Kind() == reflect.String, typ.Kind() == reflect.Int64, typ.Kind() == reflect.Int32, typ.Kind() == reflect.Uint32:
			fields++
		default:
			t.Errorf("%s is a %v", path, typ)
		}
	}
	walk(reflect.TypeFor[Line](), "Line")
	if fields != 34 {
		t.Errorf("Line has %d fields: a new one must be added to appendLine, to fullLine and to this number", fields)
	}
}

func TestTextIsEscapedSoThatALineStaysALine(t *testing.T) {
	for _, s := range []string{
		"a\nb\r\x00\x1b[31m", `quote " back \ slash`, "c1 \u009b31m del \x7f", "rtl \u202e gpj.exe",
		"astral \U0001F511 \U000E0041", "sep \u2028\u2029", "<script>&", "replacement \ufffd",
	} {
		line := encode(&Line{Why: Why{Reason: s}})
		if got := parse(t, line).Why.OperatorReason; got != s {
			t.Errorf("%q came back as %q", s, got)
		}
		for _, r := range string(line) {
			if r < ' ' || (r >= 0x7f && r < 0xa0) || r == 0x202e || r == 0x2028 {
				t.Errorf("%q leaves %U in the line", s, r)
			}
		}
	}
	if got := parse(t, encode(&Line{Action: "a\xffb"})).Action; got != "a\ufffdb" {
		t.Errorf("broken byte became %q", got)
	}
}

func TestTextIsBounded(t *testing.T) {
	id := "spiffe://" + strings.Repeat("a", maxField-9)
	if got := parse(t, encode(&Line{Target: Target{SPIFFEID: id}})).Target.SPIFFEID; got != id {
		t.Error("the longest SPIFFE ID does not fit")
	}
	for pad := range 4 {
		got := parse(t, encode(&Line{Action: strings.Repeat("x", pad) + strings.Repeat("\U0001F511", maxField)})).Action
		if len(got) > maxField+len("…") || len(got) < maxField-4 || !strings.HasSuffix(got, "…") || !utf8.ValidString(got) || strings.Contains(got, "\ufffd") {
			t.Errorf("pad %d: cut to %d bytes, end %q", pad, len(got), got[len(got)-8:])
		}
	}
}

func TestTheLongestLineIsBelowTheReadersBound(t *testing.T) {
	l := fullLine()
	long := strings.Repeat("\x00", 3*maxField)
	var fill func(reflect.Value)
	fill = func(v reflect.Value) {
		switch {
		case v.Kind() == reflect.Pointer:
			fill(v.Elem())
		case v.Type() == reflect.TypeFor[time.Time]():
		case v.Kind() == reflect.Struct:
			for _, f := range v.Fields() {
				fill(f)
			}
		case v.Kind() == reflect.String:
			v.SetString(long)
		}
	}
	fill(reflect.ValueOf(&l))
	if n := len(encode(&l)); n > maxLine || n < maxLine/2 {
		t.Errorf("the longest line has %d bytes, the reader takes %d", n, maxLine)
	}
}

func FuzzAppendText(f *testing.F) {
	f.Add("a\nb")
	f.Add("\xff\u202e\U0001F511")
	f.Fuzz(func(t *testing.T, s string) {
		text := appendText([]byte{'"'}, s)
		var back string
		if err := json.Unmarshal(append(text, '"'), &back); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if want := strings.ToValidUTF8(s, "\ufffd"); len(s) <= maxField && utf8.ValidString(s) && back != want {
			t.Fatalf("%q came back as %q", s, back)
		}
	})
}
