package reference

import (
	"flag"
	"fmt"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/agent"
	"github.com/seed-caa81108/assay/server"
)

var update = flag.Bool("update", false, "write the pages of docs/reference anew")

func TestConfigReference(t *testing.T) {
	for _, dir := range []string{"server", "agent"} {
		keys, err := Config(Root, dir, "Config")
		if err != nil {
			t.Errorf("%s: %v", dir, err)
			continue
		}
		Check(t, "config-"+dir+".md", ConfigPage("assay-"+dir, dir+".yaml", keys), *update)
	}
}

// What a comment says of a default is what the configuration gets.
func TestDefaultsInCommentsAreTrue(t *testing.T) {
	serverDefaults, err := server.Config{TrustDomain: "example.org"}.Validate()
	if err != nil {
		t.Fatal(err)
	}
	agentDefaults, err := agent.Config{
		TrustDomain: "example.org", Server: agent.ServerConfig{Addresses: []string{"ca.example.org:8443"}}, Pin: strings.Repeat("ab", 32),
	}.Validate()
	if err != nil {
		t.Fatal(err)
	}
	compared := 0
	for dir, defaults := range map[string]any{"server": serverDefaults, "agent": agentDefaults} {
		keys, err := Config(Root, dir, "Config")
		if err != nil {
			t.Fatal(err)
		}
		values := map[string]reflect.Value{}
		flatten("", reflect.ValueOf(defaults), values)
		for _, k := range leaves(keys) {
			said := defaultIn(k.Text)
			v, known := values[k.Name]
			switch {
			case !known:
				if !strings.ContainsAny(k.Name, "[N") {
					t.Errorf("%s: no such key", k.Name)
				}
			case said == "" || v.IsZero(): // said in words, or found at run time
			case !isValue(said, v):
				t.Errorf("%s.yaml: the default of %s is %v, its comment says %q", dir, k.Name, v, said)
			default:
				compared++
			}
		}
	}
	if compared < 20 {
		t.Errorf("only %d defaults compared: the test proves nothing", compared)
	}
}

func leaves(keys []Key) (all []Key) {
	for _, k := range keys {
		if k.Below == nil {
			all = append(all, k)
		}
		all = append(all, leaves(k.Below)...)
	}
	return all
}

func flatten(above string, v reflect.Value, into map[string]reflect.Value) {
	if v = reflect.Indirect(v); !v.IsValid() || v.Kind() != reflect.Struct {
		into[strings.TrimSuffix(above, ".")] = v
		return
	}
	for i := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("yaml"), ",")
		flatten(above+name+".", v.Field(i), into)
	}
}

var defaultWords = regexp.MustCompile(`Default (?:and maximum )?([^ ,]+)( MiB)?`)

// defaultIn is the value after the last Default in a comment; none if it is
// told in words.
func defaultIn(text string) string {
	all := defaultWords.FindAllStringSubmatch(text, -1)
	if len(all) == 0 {
		return ""
	}
	last := all[len(all)-1]
	value := strings.TrimSuffix(last[1], ".")
	if n, err := strconv.Atoi(value); err == nil && last[2] != "" {
		return strconv.Itoa(n << 20)
	}
	if value == "none" {
		return ""
	}
	return value
}

func isValue(text string, v reflect.Value) bool {
	if want, ok := v.Interface().(time.Duration); ok {
		d, err := time.ParseDuration(text)
		return err == nil && d == want
	}
	return text == fmt.Sprint(v.Interface())
}
