package main

import (
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/agent"
)

// minimal sets what has no default.
var minimal = agent.Config{
	TrustDomain: "example.org", Server: agent.ServerConfig{Addresses: []string{"ca.example.org:8443"}}, Pin: strings.Repeat("ab", 32),
}

// The operator's guide has each key of the configuration and no other, and its
// defaults are those that a configuration gets.
func TestTheGuideHasEveryKeyAndDefault(t *testing.T) {
	guide := guideOf(t, "../../docs/operating.md", "## agent.yaml")
	given := reflect.ValueOf(minimal)
	complete, err := minimal.Validate()
	if err != nil {
		t.Fatal(err)
	}
	set := map[string]bool{}
	eachKey(t, "", given, func(key string, v reflect.Value) { set[key] = !v.IsZero() })
	eachKey(t, "", reflect.ValueOf(complete), func(key string, v reflect.Value) {
		cell, ok := guide[key]
		delete(guide, key)
		code, isCode := strings.CutPrefix(cell, "`")
		code = strings.TrimSuffix(code, "`")
		switch {
		case !ok:
			t.Errorf("%s is not in the guide", key)
		case set[key] || v.IsZero(): // no default, or one that is found at run time
			if isCode {
				t.Errorf("%s has the default %s in the guide and none in the configuration", key, cell)
			}
		case !isCode || !same(code, v):
			t.Errorf("%s is %v by default, the guide says %s", key, v, cell)
		}
	})
	for key := range guide {
		t.Errorf("the guide has %s, the configuration has not", key)
	}
}

// guideOf reads the table under a heading: its keys and their defaults.
func guideOf(t *testing.T, path, heading string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n"+heading+"\n")
	section, _, _ = strings.Cut(section, "\n## ")
	guide := map[string]string{}
	for line := range strings.Lines(section) {
		cells := strings.Split(line, " | ")
		key, ok := strings.CutPrefix(cells[0], "| `")
		if !ok {
			continue
		}
		key = strings.TrimSuffix(key, "`")
		if _, twice := guide[key]; twice || len(cells) != 3 {
			t.Errorf("%s: %s", path, line)
			continue
		}
		guide[key] = cells[1]
	}
	return guide
}

// eachKey visits the fields that have no fields of their own.
func eachKey(t *testing.T, above string, v reflect.Value, visit func(key string, v reflect.Value)) {
	t.Helper()
	if v.Kind() != reflect.Struct {
		visit(strings.TrimSuffix(above, "."), v)
		return
	}
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("yaml")
		if name == "" {
			t.Errorf("%v.%s has no key", v.Type(), v.Type().Field(i).Name)
		}
		eachKey(t, above+name+".", v.Field(i), visit)
	}
}

func same(text string, v reflect.Value) bool {
	v = reflect.Indirect(v)
	if want, ok := v.Interface().(time.Duration); ok {
		d, err := time.ParseDuration(text)
		return err == nil && d == want
	}
	return text == fmt.Sprint(v.Interface())
}
