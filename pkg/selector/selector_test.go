package selector_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

func set(t *testing.T, texts ...string) selector.Set {
	t.Helper()
	var list []selector.Selector
	for _, text := range texts {
		s, err := selector.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, s)
	}
	return selector.NewSet(list...)
}

func TestParse(t *testing.T) {
	s, err := selector.Parse("k8s:pod-label:app:web")
	if err != nil || s.Type != "k8s" || s.Value != "pod-label:app:web" || s.String() != "k8s:pod-label:app:web" {
		t.Fatalf("got %+v, %v", s, err)
	}
	for _, bad := range []string{"", "unix", ":", "unix:", ":v", "a\x00:b", "a:b\n", strings.Repeat("t", 65) + ":v", "t:" + strings.Repeat("v", 1025)} {
		if _, err := selector.Parse(bad); !errors.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestSetContains(t *testing.T) {
	have := set(t, "unix:uid:1", "unix:gid:2", "k8s:ns:a", "unix:uid:1")
	if len(have) != 3 {
		t.Fatalf("repetition kept: %v", have)
	}
	cases := []struct {
		sub  selector.Set
		want bool
	}{
		{nil, true},
		{set(t, "unix:uid:1"), true},
		{set(t, "unix:uid:1", "k8s:ns:a"), true},
		{have, true},
		{set(t, "unix:uid:2"), false},
		{set(t, "unix:uid:1", "zzz:z"), false},
		{set(t, "a:a"), false},
	}
	for _, c := range cases {
		if got := have.Contains(c.sub); got != c.want {
			t.Errorf("Contains(%v) = %v", c.sub, got)
		}
	}
	if selector.NewSet().Contains(set(t, "a:b")) {
		t.Error("the empty set contains nothing")
	}
}

func TestKeyTellsSetsApart(t *testing.T) {
	if set(t, "a:b", "c:d").Key() != set(t, "c:d", "a:b").Key() {
		t.Error("order must not matter")
	}
	if set(t, "a:b:c").Key() == set(t, "a:b", "c:d").Key() {
		t.Error("different sets, same key")
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{"unix:uid:1000", "k8s:pod-label:a:b", ":", "a:", "x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := selector.Parse(text)
		if err != nil {
			return
		}
		if s.String() != text || s.Check() != nil {
			t.Fatalf("%q parsed to %+v", text, s)
		}
	})
}
