//go:build kube

package kube

import (
	"fmt"
	"os"
	"testing"

	"github.com/seed-caa81108/assay/test/harness"
)

// cluster is shared by the tests of this package, since it takes seconds to
// start. A test that stops its API server must not be parallel.
var cluster *Cluster

func TestMain(m *testing.M) {
	var program harness.Program
	code := 1
	if err := program.Run(func() {
		cluster = Start(&program, "../../out/kube")
		code = m.Run()
	}); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}
