// Command conformance prints how the project stands towards the SPIFFE
// standards and its own list of attacks and faults: each row is proven by the
// tests that name it, in part proven, not applicable, or open.
//
// The rows are in *.rows beside this file. A test names what it proves in a
// comment: "// WL-28", "// X509-12, X509-33", "// WL-3..5". A comment in a table
// or a helper counts for the tests that use it, if they are few.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

func main() {
	root := flag.String("root", ".", "the project's directory")
	out := flag.String("o", "", "also write the table as Markdown to this `file`")
	check := flag.String("check", "", "say what is wrong, also with the Markdown in this `file`, and print no table")
	flag.Parse()
	if err := run(os.Stdout, *root, *out, *check); err != nil {
		fmt.Fprintf(os.Stderr, "conformance: %v\n", err)
		os.Exit(1)
	}
}

func run(w io.Writer, root, out, check string) error {
	lists, err := readLists(filepath.Join(root, "test", "conformance"))
	if err != nil {
		return err
	}
	named, err := scan(root)
	if err != nil {
		return err
	}
	wrong := lists.judge(named)
	var page bytes.Buffer
	markdown(&page, lists)
	switch {
	case check != "":
		kept, err := os.ReadFile(check)
		if err != nil {
			return err
		}
		if !bytes.Equal(kept, page.Bytes()) {
			wrong = append(wrong, check+" is stale: run make conformance")
		}
	case out != "":
		if err := os.WriteFile(out, page.Bytes(), 0o644); err != nil {
			return err
		}
		fallthrough
	default:
		text(w, lists)
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%d things are wrong:\n%s", len(wrong), strings.Join(wrong, "\n"))
	}
	return nil
}
