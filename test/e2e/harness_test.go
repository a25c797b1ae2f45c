//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/seed-caa81108/assay/test/harness"
)

// binaries are built at most once in a run.
type binaries struct {
	tags string
	once sync.Once
	dir  string
	err  error
}

var (
	plain     = &binaries{}
	killable  = &binaries{tags: "failpoint"}
	buildRoot string
)

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "jq" {
		if err := playJQ(os.Args[1:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "jq:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if filepath.Base(os.Args[0]) == "probe" {
		if err := playProbe(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, "probe:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := func() int {
		dir, err := os.MkdirTemp("", "assay-bin-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() { _ = os.RemoveAll(dir) }()
		buildRoot = dir
		return m.Run()
	}()
	os.Exit(code)
}

func (b *binaries) built(t testing.TB) string {
	t.Helper()
	b.once.Do(func() {
		b.dir = filepath.Join(buildRoot, "bin-"+b.tags)
		cmd := exec.Command("go", "build", "-trimpath", "-tags", "grpcnotrace,"+b.tags, "-o", b.dir+"/", "./cmd/...")
		cmd.Dir = "../.."
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			b.err = fmt.Errorf("build: %w\n%s", err, out)
		}
	})
	if b.err != nil {
		t.Fatal(b.err)
	}
	return b.dir
}

func newSite(t testing.TB, more string) *harness.Site {
	t.Helper()
	return harness.NewSite(t, plain.built(t), more)
}
