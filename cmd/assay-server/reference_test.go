package main

import (
	"flag"
	"testing"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/test/reference"
)

var update = flag.Bool("update", false, "write the page of docs/reference anew")

func TestCommandReference(t *testing.T) {
	reference.Check(t, "assay-server.md", reference.Commands(daemon.Commands(program())), *update)
}
