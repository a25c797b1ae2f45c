package attest

import (
	"os"
	"strings"
	"testing"
)

func TestParseStat(t *testing.T) {
	tail := strings.Repeat(" 0", 18)
	for name, want := range map[string]string{"plain": "S", "with space": "Z", "a) R (b": "X", "": "R"} {
		state, start, err := parseStat([]byte("12 (" + name + ") " + want + tail + " 4711 0 0\n"))
		if err != nil || state != want || start != "4711" {
			t.Errorf("%q: %q %q %v", name, state, start, err)
		}
	}
}

func TestEffectiveIDsAreOurs(t *testing.T) {
	got, err := effectiveIDs(int32(os.Getpid()))
	if err != nil || got.uid != uint32(os.Geteuid()) || got.gid != uint32(os.Getegid()) {
		t.Fatalf("%+v %v", got, err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("1 (a) S" + strings.Repeat(" 0", 30)))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if state, start, err := parseStat(data); err == nil && (state == "" || start == "") {
			t.Fatal("empty fields without an error")
		}
	})
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte("Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseStatus(data)
		if err != nil && got != (id{}) {
			t.Fatal("ids beside an error")
		}
	})
}
