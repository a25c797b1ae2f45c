//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
)

// What the real daemons tell of themselves is in the reference, all of it.
func TestScrapedMetricsAreInTheReference(t *testing.T) {
	page, err := os.ReadFile("../../docs/reference/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	for _, port := range []int{s.Ops, a.Ops} {
		resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", port))
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		ours := 0
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if len(fields) != 4 || fields[0] != "#" || fields[1] != "TYPE" || strings.HasPrefix(fields[2], "go_") || strings.HasPrefix(fields[2], "process_") {
				continue
			}
			if ours++; !strings.Contains(string(page), fmt.Sprintf("| `%s` | %s |", fields[2], fields[3])) {
				t.Errorf("%s, a %s, is not in the reference: run make docs", fields[2], fields[3])
			}
		}
		if ours < 5 {
			t.Errorf("only %d metrics on port %d: the test proves nothing", ours, port)
		}
	}
}
