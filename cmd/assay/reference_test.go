package main

import (
	"testing"

	"github.com/seed-caa81108/assay/test/reference"
)

func TestCommandReference(t *testing.T) {
	reference.Check(t, "assay.md", reference.Commands(newRoot(&tool{})), *update)
}
