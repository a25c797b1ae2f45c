package main

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/seed-caa81108/assay/test/harness"
)

// sizes reports the binaries.
func (b *bench) sizes() {
	for name, goal := range map[string]string{"assay-server": "<= 65 MB", "assay-agent": "<= 20 MB"} {
		info, err := os.Stat(filepath.Join(b.bins, name))
		b.must(err)
		b.add("binary "+name, fmt.Sprintf("%.1f MB", float64(info.Size())/1e6), "", "", goal)
	}
}

// idle reports resident memory of the two daemons.
func (b *bench) idle(s *harness.Site, a *harness.Agent) {
	b.add("RSS of the server after signing", mb(rss(s.Server.PID())), "", "", "idle <= 45 MB")
	b.add("RSS of an idle agent", mb(rss(a.PID())), "", "", "<= 25 MB")
}

// coldStart measures from exec to served, the median of five.
func (b *bench) coldStart() {
	var server, restart, agent []time.Duration
	for range 5 {
		s := harness.NewSite(b, b.bins, "")
		s.Run("assay-server", "seal-key", s.File("warm.key")) // the binary is in the page cache
		server = append(server, b.untilConnected(func() *harness.Process { s.LaunchServer(); return s.Server }, "unix", s.AdminSocket()))
		s.Server.WaitReady(s.Ops)
		a := s.NewAgent("agent")
		token := a.Join()
		s.CreateEntry(a.ID, "spiffe://example.org/w")
		agent = append(agent, b.untilFetched(a, token))
		a.Stop(syscall.SIGTERM)
		s.Server.Stop(syscall.SIGTERM)
		restart = append(restart, b.untilConnected(func() *harness.Process { s.LaunchServer(); return s.Server }, "unix", s.AdminSocket()))
		s.Server.Stop(syscall.SIGTERM)
	}
	b.add("cold start: server, empty", ms(quantile(server, .5)), "", "", "<= 65 ms")
	b.add("cold start: server again", ms(quantile(restart, .5)), "", "", "")
	b.add("cold start: agent with token, entry just made, to first SVID", ms(quantile(agent, .5)), "", "", "<= 120 ms")
}

func (b *bench) untilConnected(launch func() *harness.Process, network, addr string) time.Duration {
	begin := time.Now()
	p := launch()
	p.Eventually(20*time.Second, addr, func() error {
		conn, err := net.Dial(network, addr)
		if err == nil {
			_ = conn.Close()
		}
		return err
	})
	return time.Since(begin)
}

func (b *bench) untilFetched(a *harness.Agent, token harness.Token) time.Duration {
	begin := time.Now()
	a.Launch(token)
	a.Eventually(20*time.Second, "socket", func() error { _, err := os.Stat(a.Socket()); return err })
	c := b.workload(a.Endpoint())
	a.Eventually(20*time.Second, "SVID", c.fetch)
	return time.Since(begin)
}

// metric reads a metric without labels from a daemon.
func metric(port int, name string) (float64, error) {
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", port))
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, fmt.Errorf("no metric %s", name)
}

func rss(pid int) int64 {
	return statField(fmt.Sprintf("/proc/%d/statm", pid), 1) * int64(os.Getpagesize())
}

// cpu returns the processor time that a process has used, in steps of 10 ms.
func cpu(pid int) time.Duration {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	return time.Duration(statField(path, 13)+statField(path, 14)) * 10 * time.Millisecond
}

func statField(path string, n int) int64 {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	text := string(data)
	if i := strings.LastIndexByte(text, ')'); i >= 0 {
		text = "pid comm" + text[i+1:]
	}
	fields := strings.Fields(text)
	v, _ := strconv.ParseInt(fields[n], 10, 64)
	return v
}

func mb(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
