package harness

import (
	"bufio"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// Metric reads one series of the daemon whose metrics are at a port, with its
// labels as they are printed; 0 if there is none.
func Metric(tb TB, port int, series string) float64 {
	tb.Helper()
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", port))
	if err != nil {
		tb.Fatalf("%v", err)
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), series+" "); ok {
			n, err := strconv.ParseFloat(text, 64)
			if err != nil {
				tb.Fatalf("%v", err)
			}
			return n
		}
	}
	if err := lines.Err(); err != nil {
		tb.Fatalf("%v", err)
	}
	return 0
}
