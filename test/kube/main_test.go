//go:build kube

package kube

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/seed-caa81108/assay/test/harness"
)

// cluster is shared by the tests of this package, since it takes seconds to
// start. A test that stops its API server must not be parallel.
var cluster *Cluster

// bins has the programs of this project.
var bins string

// play is another program if the arguments name one.
func play(args []string) {
	if len(args) < 2 {
		return
	}
	var err error
	switch args[0] {
	case workloadArg:
		os.Exit(playWorkload(args[1]))
	case guardArg:
		err = playGuard(args[1])
	case runtimeArg:
		err = playRuntime(tree(args[1]), args[2], args[3])
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func TestMain(m *testing.M) {
	play(os.Args[1:])
	var program harness.Program
	code := 1
	if err := program.Run(func() {
		cluster = Start(&program, "../../out/kube")
		dir, err := os.MkdirTemp("", "assay-bin-")
		program.Must(err)
		program.Cleanup(func() { _ = os.RemoveAll(dir) })
		build := exec.Command("go", "build", "-tags", "grpcnotrace", "-trimpath", "-o", dir+"/", "./cmd/...")
		build.Dir, build.Env, build.Stderr = "../..", append(os.Environ(), "CGO_ENABLED=0"), os.Stderr
		program.Must(build.Run())
		bins = dir
		code = m.Run()
	}); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}
