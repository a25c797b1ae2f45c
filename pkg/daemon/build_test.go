package daemon

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func TestBuildSaysWhichCodeRuns(t *testing.T) {
	revision := debug.BuildSetting{Key: "vcs.revision", Value: "0123456789abcdef0123"}
	dirty := debug.BuildSetting{Key: "vcs.modified", Value: "true"}
	for _, c := range []struct {
		info *debug.BuildInfo
		want string
	}{
		{&debug.BuildInfo{GoVersion: "go1.26", Main: debug.Module{Version: "v1.2.3"}, Settings: []debug.BuildSetting{revision}}, "v1.2.3 (0123456789ab, go1.26)"},
		{&debug.BuildInfo{GoVersion: "go1.26", Main: debug.Module{Version: "(devel)"}, Settings: []debug.BuildSetting{dirty, revision}}, "devel (0123456789ab+dirty, go1.26)"},
		{&debug.BuildInfo{Settings: []debug.BuildSetting{dirty, {Key: "vcs.revision", Value: "01"}}}, "devel (01+dirty)"},
		{&debug.BuildInfo{}, "devel"},
	} {
		if got := buildOf(c.info).String(); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
	if b := ReadBuild(); b.Go != runtime.Version() || b.Version == "" {
		t.Errorf("this program: %+v", b)
	}
}

func TestRegistryHasProcessAndBuild(t *testing.T) {
	families, err := NewRegistry(Build{Version: "v1", Revision: "abc", Go: "go1"}).Gather()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range families {
		names = append(names, f.GetName())
		if f.GetName() == "assay_build_info" && f.GetMetric()[0].GetGauge().GetValue() != 1 {
			t.Error("assay_build_info is not 1")
		}
	}
	for _, want := range []string{"assay_build_info", "go_goroutines", "process_open_fds", "process_resident_memory_bytes"} {
		if !slices.Contains(names, want) {
			t.Errorf("no %s in %v", want, names)
		}
	}
}

func TestLoggerLevelsAndFormats(t *testing.T) {
	var out bytes.Buffer
	log, err := NewLogger(&out, "warn", "json")
	if err != nil {
		t.Fatal(err)
	}
	log.InfoContext(t.Context(), "quiet")
	log.WarnContext(t.Context(), "loud", slog.String("k", "v"))
	var line map[string]any
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || line["msg"] != "loud" || line["k"] != "v" {
		t.Errorf("%q: %v", out.String(), err)
	}

	out.Reset()
	if log, err = NewLogger(&out, "", ""); err != nil {
		t.Fatal(err)
	}
	log.DebugContext(t.Context(), "quiet")
	log.InfoContext(t.Context(), "two\nlines")
	if got := out.String(); !strings.Contains(got, `msg="two\nlines"`) || strings.Count(got, "\n") != 1 {
		t.Errorf("%q", got)
	}

	for _, bad := range [][2]string{{"loud", "text"}, {"INFO", "text"}, {"info", "xml"}} {
		if _, err := NewLogger(&out, bad[0], bad[1]); fault.ReasonOf(err) != "config_invalid" {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
