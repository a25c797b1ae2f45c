//go:build e2e && long

package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const gospiffe = "../tools/gospiffe"

// CLIENT-18, PLAN-8: releases of go-spiffe that are in use, the one of SPIRE
// 1.12 among them, follow the agent through a new entry, a revocation and a
// restart. The newest is what all other tests use.
func TestReleasesOfGoSPIFFEFollow(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	const one, two = "spiffe://example.org/one", "spiffe://example.org/two"
	s.CreateEntry(a.ID, one, "--hint", "x")

	modules, err := filepath.Glob(gospiffe + "/*.mod")
	if err != nil || len(modules) < 3 {
		t.Fatalf("modules %v, %v", modules, err)
	}
	programs, followers := map[string]string{}, map[string]*bufio.Scanner{}
	for _, module := range modules {
		name := filepath.Base(module)
		programs[name] = buildFollower(t, name)
	}
	for name, program := range programs {
		followers[name] = follow(t, name, program, a.Endpoint())
	}
	all := func(want string) {
		t.Helper()
		for name, lines := range followers {
			if got := nextUpdate(lines); got != want {
				t.Fatalf("%s: %q, want %q", name, got, want)
			}
		}
	}
	all(one)
	var second struct {
		ID string `json:"id"`
	}
	s.CLIJSON(&second, "entry", "create", "--parent-id", a.ID, "--spiffe-id", two, "--hint", "y", "--selector", fmt.Sprintf("unix:uid:%d", os.Getuid()))
	all(one + " " + two)
	s.CLI("entry", "delete", second.ID)
	all(one)
	a.Restart(syscall.SIGTERM)
	all(one)
	s.CreateEntry(a.ID, two)
	all(one + " " + two)
}

// nextUpdate passes over the errors of the time in which there was no agent.
func nextUpdate(lines *bufio.Scanner) string {
	for lines.Scan() {
		if !strings.HasPrefix(lines.Text(), "error: rpc error: ") {
			return lines.Text()
		}
	}
	return "the end"
}

// buildFollower builds the client of one module file.
func buildFollower(t *testing.T, module string) (program string) {
	t.Helper()
	program = filepath.Join(buildRoot, "gospiffe-"+module)
	build := exec.Command("go", "build", "-modfile="+module, "-o", program, ".")
	build.Dir = gospiffe
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build with %s: %v\n%s", module, err, out)
	}
	return program
}

// follow starts the client of one module file.
func follow(t *testing.T, module, program, endpoint string) *bufio.Scanner {
	t.Helper()
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+endpoint)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// A client that hears nothing has to fail the test, not to hang it.
	patience := time.AfterFunc(3*time.Minute, func() { _ = cmd.Process.Kill() })
	t.Cleanup(func() {
		patience.Stop()
		_ = stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", module, err)
		}
	})
	return bufio.NewScanner(stdout)
}
