package daemon

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// sample has every kind of field that a configuration may have.
type sample struct {
	Name    string            `yaml:"name"`
	TTL     time.Duration     `yaml:"ttl"`
	Window  *time.Duration    `yaml:"window"`
	Count   int               `yaml:"count"`
	Small   uint8             `yaml:"small"`
	Ratio   float64           `yaml:"ratio"`
	On      bool              `yaml:"on"`
	UIDs    []uint32          `yaml:"uids"`
	Names   []string          `yaml:"names"`
	Labels  map[string]string `yaml:"labels"`
	Address netip.Addr        `yaml:"address"`
	Log     sampleLog         `yaml:"log"`
	Nodes   []sampleLog       `yaml:"nodes"`
	Token   *sampleLog        `yaml:"token"`
	Secret  string            `yaml:"-"`
	hidden  string            //nolint:unused // shows that fields without export stay out
	NoTag   string
}

type sampleLog struct {
	Level string `yaml:"level"`
}

func writeConfig(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "server.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoadFillsEveryKindOfField(t *testing.T) {
	window := time.Duration(0)
	want := sample{
		Name: "example.org", TTL: 90 * time.Minute, Window: &window, Count: -3, Small: 255, Ratio: 0.5, On: true,
		UIDs: []uint32{0, 4294967295}, Names: []string{"a", "1000"}, Labels: map[string]string{"k": "v"},
		Address: netip.MustParseAddr("::1"), Log: sampleLog{"debug"}, Nodes: []sampleLog{{"a"}, {"b"}}, Token: &sampleLog{"t"},
	}
	for name, text := range map[string]string{
		"blocks": `# a comment
name: example.org   # another
ttl: 1h30m
window: 0
count: -3
small: 255
ratio: 0.5
on: true
uids: [0, 4294967295]
names:
  - a
  - 1000
labels:
  k: v
address: "::1"
log:
  level: debug
nodes:
  - level: a
  - level: b
token: {level: t}
`,
		"flow": `{name: "example.org", ttl: '1h30m', window: 0s, count: -3, small: 255, ratio: 0.5, on: true, uids: [0, 4294967295], ` +
			`names: [a, "1000"], labels: {k: v}, address: "::1", log: {level: debug}, nodes: [{level: a}, {level: b}], token: {level: t}}`,
	} {
		t.Run(name, func(t *testing.T) {
			var got sample
			if err := Load(writeConfig(t, text), &got); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("got  %+v\nwant %+v", got, want)
			}
		})
	}
}

func TestTextIsTakenAsItIsWritten(t *testing.T) {
	for text, want := range map[string]string{
		"2026-11-23": "2026-11-23", "0123": "0123", "1e3": "1e3", "yes": "yes", `"true"`: "true", "':8443'": ":8443",
		"127.0.0.1:9402": "127.0.0.1:9402", "/a b/c": "/a b/c", `""`: "", "|\n  two\n  lines\n": "two\nlines\n",
	} {
		var got sample
		if err := Load(writeConfig(t, "name: "+text), &got); err != nil || got.Name != want {
			t.Errorf("%q became %q, %v", text, got.Name, err)
		}
	}
}

func TestEmptyFilesAndKeysLeaveDefaults(t *testing.T) {
	for _, text := range []string{"", "\n", "# nothing\n", "---\n", "name:\n", "log:\n", "name: ~\nuids: null\n", "log:\n  # level: debug\nname:\n"} {
		got := sample{Name: "kept"}
		if err := Load(writeConfig(t, text), &got); err != nil || !reflect.DeepEqual(got, sample{Name: "kept"}) {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}

// Each message is one line that names the file, the line and the key.
func TestLoadRefuses(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"name: a\nnam: b\n", `line 2: unknown key "nam"; known are name, ttl, `},
		{"log:\n  level: x\n  levels: y\n", `line 3: unknown key "log.levels"; known are level`},
		{"nodes:\n  - level: a\n  - lvl: b\n", `line 3: unknown key "nodes[1].lvl"`},
		{"Name: a\n", `line 1: unknown key "Name"`},
		{"Secret: a\n", `line 1: unknown key "Secret"`},
		{"NoTag: a\n", `line 1: unknown key "NoTag"`},
		{"hidden: a\n", `line 1: unknown key "hidden"`},
		{"name: a\nttl: 1h\nname: b\n", `line 3: key "name" is given twice, first in line 1`},
		{"log: {level: a, level: b}\n", `line 1: key "log.level" is given twice, first in line 1`},
		{"labels:\n  k: v\n  k: w\n", `line 3: key "labels.k" is given twice`},
		{"\nttl: 90\n", `line 2: ttl: "90" is not a duration: write a number and a unit`},
		{"ttl: soon\n", `line 1: ttl: "soon" is not a duration`},
		{"ttl: [1h]\n", `line 1: ttl: must be a duration`},
		{"window: true\n", `line 1: window: must be a duration`},
		{"count: many\n", `line 1: count: must be a number`},
		{"count: \"3\"\n", `line 1: count: must be a number in decimal digits, without quotes`},
		{"count: 0x10\n", `line 1: count: "0x10" is not a whole number`},
		{"count: 1.5\n", `line 1: count: "1.5" is not a whole number`},
		{"small: 256\n", `line 1: small: "256" is not a whole number in range`},
		{"small: -1\n", `line 1: small: "-1" is not a whole number in range, not negative`},
		{"uids: [1, x]\n", `line 1: uids[1]: must be a number`},
		{"uids: 1\n", `line 1: uids: must be a list, as in [1, 2]`},
		{"names: a\n", `line 1: names: must be a list, as in [one, two]`},
		{"nodes: a\n", `line 1: nodes: must be a list, as in [{...}, {...}]`},
		{"names:\n  - a\n  -\n", `names[1]: is empty`},
		{"on: yes\n", `line 1: on: must be true or false`},
		{"on: \"true\"\n", `line 1: on: must be true or false`},
		{"name: true\n", `line 1: name: must be text: put the value in quotes`},
		{"name: {a: b}\n", `line 1: name: must be text`},
		{"name: [a]\n", `line 1: name: must be text`},
		{"log: debug\n", `line 1: log: must be a mapping`},
		{"log:\n  - level: a\n", `line 2: log: must be a mapping`},
		{"- name\n", `line 1: must be a mapping`},
		{"just words\n", `line 1: must be a mapping`},
		{"address: nowhere\n", `line 1: address: ParseAddr`},
		{"name: a\n---\nname: b\n", `a second document begins`},
		{"log: &x {level: a}\ntoken: *x\n", `line 1: anchors, aliases and merges are not taken`},
		{"log:\n  <<: {level: a}\n", `line 2: anchors, aliases and merges are not taken`},
		{"name: !!str 5\n", `line 1: tags are not taken`},
		{"%YAML 1.1\n---\nname: a\n", `line 1: directives are not taken`},
		{"? name\n: a\n", `line 1: keys marked with ? are not taken`},
		{"name: \"a\n", `line 1: `},
		{"name: |" + strings.Repeat("x", 4000) + "\n y\n", `line 1: invalid header option`},
		{"name: a\n\tttl: 1h\n", `line 2: `},
		{"names: " + strings.Repeat("[", 17) + strings.Repeat("]", 17), `line 1: is nested too deeply`},
		{"names:\n" + strings.Repeat("- ", 17) + "a", `line 2: is nested too deeply`},
		{strings.Repeat("n", 3000) + ": a\n", `unknown key "` + strings.Repeat("n", 64) + `…"`},
		{"name: \"" + strings.Repeat("x", maxConfigBytes) + "\"", `has more than 65536 bytes`},
	} {
		path := writeConfig(t, c.text)
		var got sample
		err := Load(path, &got)
		if !errors.Is(err, fault.Precondition) || fault.ReasonOf(err) != "config_invalid" {
			t.Errorf("%.40q: %v", c.text, err)
			continue
		}
		text := fault.SafeText(err)
		if !strings.HasPrefix(text, path) || !strings.Contains(text, c.want) || strings.Contains(text, "\n") || len(text) > 700 {
			t.Errorf("%.40q:\ngot  %s\nwant %s", c.text, text, c.want)
		}
	}
}

func TestLoadChecksTheFile(t *testing.T) {
	dir := t.TempDir()
	cases := []struct {
		name, reason string
		make         func(path string) error
	}{
		{"missing", "config_missing", func(string) error { return nil }},
		{"directory", "config_unreadable", func(path string) error { return os.Mkdir(path, 0o700) }},
		{"others may write", "path_untrusted", func(path string) error { // NEG-44
			return errors.Join(os.WriteFile(path, nil, 0o600), os.Chmod(path, 0o606))
		}},
	}
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(dir, fmt.Sprint(i))
			if err := c.make(path); err != nil {
				t.Fatal(err)
			}
			if err := Load(path, &sample{}); fault.ReasonOf(err) != c.reason || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("link to a good one", func(t *testing.T) { // as Secret volumes are
		link := filepath.Join(dir, "link")
		if err := os.Symlink(writeConfig(t, "name: a"), link); err != nil {
			t.Fatal(err)
		}
		var got sample
		if err := Load(link, &got); err != nil || got.Name != "a" {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

func TestLoadTellsDefectsOfTheProgram(t *testing.T) {
	path := writeConfig(t, "bad: 1\n")
	for _, into := range []any{nil, sample{}, new(int), &struct {
		Bad chan int `yaml:"bad"`
	}{}} {
		err := Load(path, into)
		if _, isFault := errors.AsType[*fault.Fault](err); err == nil || isFault {
			t.Errorf("%T: %v", into, err)
		}
	}
}

// Whatever a file holds, loading it is quick, does not panic, and either fills
// the struct or says in one short line what is wrong.
func FuzzLoad(f *testing.F) {
	for _, text := range []string{
		"name: a\nttl: 1h\n", "log: {level: debug}", "uids: [1, 2]\nnodes:\n  - level: x\n", "a: &a [*a]", "name: |\n  x\n",
		"? a\n: b", "{[", "- - - a", "\xef\xbb\xbfname: a", "name: \"\\u0000\"", "labels: {<<: x}", "on: !!bool y", "ttl: -.inf",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > maxConfigBytes {
			return
		}
		var got sample
		start := time.Now()
		err := decodeConfig("f", data, reflect.ValueOf(&got).Elem())
		if took := time.Since(start); took > 20*time.Second {
			t.Fatalf("took %v", took)
		}
		if err == nil {
			return
		}
		if fault.ReasonOf(err) != "config_invalid" {
			t.Fatalf("%v", err)
		}
		if text := fault.SafeText(err); strings.ContainsAny(text, "\n\r\x00\x1b") || len(text) > 4<<10 {
			t.Fatalf("%q", text)
		}
	})
}

// A document that is no configuration file has no bound of its own, and is
// held to all the rest.
func TestDecodeTakesWhatLoadTakes(t *testing.T) {
	var got sample
	text := "name: x\n" + strings.Repeat("# long\n", maxConfigBytes/4)
	if err := Decode("a document", []byte(text), &got); err != nil || got.Name != "x" {
		t.Errorf("%v, %+v", err, got)
	}
	err := Decode("a document", []byte("name: x\nother_name: y\n"), &got)
	if fault.ReasonOf(err) != "config_invalid" || !strings.HasPrefix(fault.SafeText(err), `a document: line 2: unknown key "other_name"`) {
		t.Error(err)
	}
	if err := Decode("a document", nil, got); err == nil {
		t.Error("decoded into a value that nobody sees")
	}
}
