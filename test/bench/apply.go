package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/seed-caa81108/assay/test/harness"
)

const (
	fileEntries = 20_000
	openStreams = 2_000
	fileChanges = 20
)

// applying measures `entry apply` of a large file: the first time, and with one
// change, while very many streams are open and one of them waits for it.
func (b *bench) applying(*harness.Site) {
	s := harness.NewSite(b, b.bins, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.More = "attestation:\n  unix:\n    discover_workload_path: true\n"
	a.Start(a.Join())
	// The workload is a program of its own, so that the change is for it alone.
	program := b.copyOfSelf(s)
	f := entriesFile{b: b, s: s, agent: a.ID, program: program, hint: "first"}
	f.write()
	begin := time.Now()
	s.CLI("entry", "apply", "-f", f.path())
	b.add(fmt.Sprintf("%d entries by entry apply", fileEntries), fmt.Sprintf("%.2f s", time.Since(begin).Seconds()), "", "", "<= 3 s there")

	b.keepStreams(s, a)
	arrivals := b.hints(program, a.Endpoint())
	await(b, arrivals, f.hint)
	var took, arrived, alone []time.Duration
	for i := range fileChanges {
		f.hint = fmt.Sprintf("by-file-%d", i)
		f.write()
		begin := time.Now()
		s.CLI("entry", "apply", "-f", f.path())
		took = append(took, time.Since(begin))
		arrived = append(arrived, await(b, arrivals, f.hint).Sub(begin))
		time.Sleep(quiet)
	}
	admin := b.admin(s)
	id := admin.find("/ns/apply/sa/one")
	for i := range samples {
		hint := fmt.Sprintf("by-call-%d", i)
		begin := time.Now()
		admin.setHint(id, hint)
		alone = append(alone, await(b, arrivals, hint).Sub(begin))
		time.Sleep(quiet)
	}
	b.add(fmt.Sprintf("one change in a file of %d, %d streams open: entry apply, p50", fileEntries, openStreams), ms(quantile(took, .5)), "", "", "<= 200 ms there")
	b.add("  from its start to the SVID in the workload's stream, p50", ms(quantile(arrived, .5)), "", "", "")
	b.add("  change to SVID in that stream, p50", ms(quantile(alone, .5)), "", "", "<= 20 ms")
	b.add("  change to SVID in that stream, p99", ms(quantile(alone, .99)), "", "", "<= 100 ms")
}

// entriesFile is a file of entries in JSON, one of which matches a program on
// the agent's node.
type entriesFile struct {
	b                    *bench
	s                    *harness.Site
	agent, program, hint string
}

func (f *entriesFile) path() string { return f.s.File("entries.json") }

func (f *entriesFile) write() {
	type entry struct {
		SPIFFEID  string   `json:"spiffe_id"`
		ParentID  string   `json:"parent_id"`
		Selectors []string `json:"selectors"`
		Hint      string   `json:"hint,omitempty"`
	}
	var doc struct {
		Entries []entry `json:"entries"`
	}
	const domain = "spiffe://" + harness.TrustDomain
	for i := range fileEntries {
		doc.Entries = append(doc.Entries, entry{
			SPIFFEID:  fmt.Sprintf(domain+"/ns/team-%d/sa/workload-%d", i%50, i),
			ParentID:  fmt.Sprintf(domain+"/assay/agent/join_token/%032x", i%100),
			Selectors: []string{fmt.Sprintf("k8s:ns:team-%d", i%50), fmt.Sprintf("k8s:sa:workload-%d", i)},
		})
	}
	doc.Entries[fileEntries/2] = entry{
		SPIFFEID: domain + "/ns/apply/sa/one", ParentID: f.agent, Hint: f.hint,
		Selectors: []string{fmt.Sprintf("unix:uid:%d", os.Getuid()), "unix:path:" + f.program},
	}
	text, err := json.Marshal(doc)
	f.b.must(err)
	f.s.Write("entries.json", string(text))
}

// copyOfSelf returns this program under a path that no other process runs.
func (b *bench) copyOfSelf(s *harness.Site) string {
	from, err := os.Open("/proc/self/exe")
	b.must(err)
	defer func() { _ = from.Close() }()
	path := s.File("one")
	to, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	b.must(err)
	_, err = io.Copy(to, from)
	b.must(err)
	b.must(to.Close())
	return path
}

// keepStreams opens the streams, each of which has an SVID, and leaves them
// open until the end of the run.
func (b *bench) keepStreams(s *harness.Site, a *harness.Agent) {
	s.CreateEntry(a.ID, "spiffe://"+harness.TrustDomain+"/open")
	a.Eventually(10*time.Second, "SVID", b.workload(a.Endpoint()).fetch)
	ctx, cancel := context.WithCancel(context.Background())
	b.Cleanup(cancel)
	var wg sync.WaitGroup
	for range openStreams / perConn {
		conn, err := grpc.NewClient(a.Endpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		b.must(err)
		b.Cleanup(func() { _ = conn.Close() })
		c := clientOn(ctx, conn)
		wg.Go(func() {
			for range perConn {
				if err := c.open(); err != nil {
					b.Errorf("open a stream: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

// arrival is when an SVID with this hint came.
type arrival struct {
	hint string
	at   time.Time
}

// hints runs program as a workload and returns what it receives.
func (b *bench) hints(program, endpoint string) <-chan arrival {
	child := exec.Command(program, "-hints", endpoint)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	b.must(err)
	b.must(child.Start())
	b.Cleanup(func() {
		_ = child.Process.Signal(syscall.SIGKILL)
		_ = child.Wait()
	})
	arrivals := make(chan arrival, 1000)
	go func() {
		defer close(arrivals)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			at, hint, _ := strings.Cut(lines.Text(), " ")
			if moment, err := time.Parse(time.RFC3339Nano, at); err == nil {
				arrivals <- arrival{hint, moment}
			}
		}
	}()
	return arrivals
}

// printHints is the child: a line for each SVID of each message.
func printHints(endpoint string) error {
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	c := clientOn(context.Background(), conn)
	stream, err := c.api.FetchX509SVID(c.ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		at := time.Now()
		for _, svid := range resp.GetSvids() {
			fmt.Println(at.Format(time.RFC3339Nano), svid.GetHint())
		}
	}
}

func await(b *bench, arrivals <-chan arrival, hint string) time.Time {
	deadline := time.After(20 * time.Second)
	for {
		select {
		case got, ok := <-arrivals:
			if !ok {
				b.Fatalf("the workload ended")
			}
			if got.hint == hint {
				return got.at
			}
		case <-deadline:
			b.Fatalf("hint %q did not arrive", hint)
		}
	}
}

// find returns the id of the entry for a path.
func (c *adminClient) find(path string) string {
	resp, err := c.entries.ListEntries(context.Background(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{
		BySpiffeId: &types.SPIFFEID{TrustDomain: harness.TrustDomain, Path: path},
	}})
	c.b.must(err)
	if len(resp.GetEntries()) != 1 {
		c.b.Fatalf("%d entries for %s", len(resp.GetEntries()), path)
	}
	return resp.GetEntries()[0].GetId()
}

func (c *adminClient) setHint(id, hint string) {
	resp, err := c.entries.BatchUpdateEntry(context.Background(), &entryv1.BatchUpdateEntryRequest{
		Entries: []*types.Entry{{Id: id, Hint: hint}}, InputMask: &types.EntryMask{Hint: true},
	})
	c.b.must(err)
	if st := resp.GetResults()[0].GetStatus(); st.GetCode() != 0 {
		c.b.Fatalf("update entry: %s", st.GetMessage())
	}
}
