// Command bench measures what docs/performance.md promises, through the real
// binaries on this machine's loopback, and prints each figure with its ratio to
// what the machine can do at best, measured in the same run.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/seed-caa81108/assay/test/harness"
)

func main() {
	bins := flag.String("bin", "bin", "directory of the three binaries")
	only := flag.String("only", "", "measure just the part of this name")
	out := flag.String("o", "", "also write the table to this Markdown file")
	limit := flag.String("limit-server", "", "internal: serve the empty Workload API on this socket")
	impostor := flag.String("impostor", "", "internal: connect descriptor 3 to this socket, then become another program")
	hints := flag.String("hints", "", "internal: print the hints of the SVIDs that come from this Workload API")
	flag.Parse()
	var err error
	switch {
	case *limit != "":
		err = serveConstant(*limit)
	case *impostor != "":
		err = becomeAnother(*impostor)
	case *hints != "":
		err = printHints(*hints)
	default:
		var dir string
		if dir, err = filepath.Abs(*bins); err == nil {
			err = run(dir, *only, *out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// row is one line of the table.
type row struct {
	what, got, limit, ratio, goal string
}

// bench collects rows.
type bench struct {
	harness.Program
	bins string
	rows []row
}

func (b *bench) must(err error) { b.Must(err) }

func (b *bench) add(what, got, limit, ratio, goal string) {
	b.rows = append(b.rows, row{what, got, limit, ratio, goal})
	b.Logf("%-55s %s %s", what, got, ratio)
}

// part measures some rows at a site whose server runs.
type part struct {
	name    string
	measure func(*bench, *harness.Site)
}

func parts() []part {
	return []part{
		{"sizes", func(b *bench, _ *harness.Site) { b.sizes() }},
		{"start", func(b *bench, _ *harness.Site) { b.coldStart() }},
		{"signing", (*bench).signing},
		{"workload", (*bench).oneAgent},
		{"streams", (*bench).streams},
		{"node", (*bench).node},
		{"entries", (*bench).entries},
		{"apply", (*bench).applying},
	}
}

// oneAgent measures what a single agent with few entries does.
func (b *bench) oneAgent(s *harness.Site) {
	a := s.NewAgent("agent")
	a.Start(a.Join())
	b.idle(s, a)
	b.propagation(s, a)
	b.fetching(s, a)
	b.connectThenExec(a)
	a.Stop(syscall.SIGTERM)
}

func run(bins, only, out string) error {
	b := &bench{bins: bins}
	err := b.Run(func() {
		// One client plays the agents of a whole fleet: what a single agent may
		// do is not what is measured.
		s := harness.NewSite(b, b.bins, "limits:\n  signatures_per_second_per_agent: 1000000\n")
		s.StartServer()
		for _, p := range parts() {
			if only == "" || only == p.name {
				p.measure(b, s)
			}
		}
	})
	if err != nil {
		return err
	}
	table := b.table()
	fmt.Print(table)
	if out != "" {
		return os.WriteFile(out, []byte(table), 0o644)
	}
	return nil
}

func (b *bench) table() string {
	var t strings.Builder
	fmt.Fprintf(&t, "%s, %d cores, %s/%s, %s\n\n", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, runtime.Version())
	w := tabwriter.NewWriter(&t, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| what\t| measured\t| limit of this run\t| ratio\t| goal\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|---\t|---\t|")
	for _, r := range b.rows {
		fmt.Fprintf(w, "| %s\t| %s\t| %s\t| %s\t| %s\t|\n", r.what, r.got, r.limit, r.ratio, r.goal)
	}
	_ = w.Flush()
	return t.String()
}

// quantile returns the q-th quantile of samples, which it sorts.
func quantile(samples []time.Duration, q float64) time.Duration {
	slices.Sort(samples)
	return samples[min(int(q*float64(len(samples))), len(samples)-1)]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }
