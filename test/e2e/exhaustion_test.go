//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/test/harness"
)

// peakRSS is the most memory that a process had, in bytes.
func peakRSS(t testing.TB, pid int) int64 {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(data)
	if m == nil {
		t.Fatal("no VmHWM")
	}
	n, err := strconv.ParseInt(string(m[1]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n << 10
}

// target is a socket under attack.
type target struct {
	name, network, address string
	call                   string // a call of anybody's
	process                *harness.Process
	// alive fails unless others are served.
	alive func()
}

// attacks are what NEG-28 lists for the transport.
var attacks = map[string]func(*testing.T, *rawHTTP2, string){
	"headers of 1 MB": func(_ *testing.T, r *rawHTTP2, call string) {
		var more []hpack.HeaderField
		for i := range 64 {
			more = append(more, hpack.HeaderField{Name: fmt.Sprint("x-", i), Value: strings.Repeat("\x01", 16<<10)})
		}
		block := request(call, more...)
		first, rest := block[:16<<10], block[16<<10:]
		ok := r.write(func() error { return r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: first}) })
		for ok && len(rest) > 0 {
			n := min(len(rest), 16<<10)
			ok = r.write(func() error { return r.WriteContinuation(1, n == len(rest), rest[:n]) })
			rest = rest[n:]
		}
		r.awaitsOrClosed("a refusal", func() bool { return r.ended[1] || r.told })
	},
	"CONTINUATION without end": func(t *testing.T, r *rawHTTP2, call string) {
		ok := r.write(func() error {
			return r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: request(call)})
		})
		var field bytes.Buffer
		_ = hpack.NewEncoder(&field).WriteField(hpack.HeaderField{Name: "x", Value: "y"})
		piece := bytes.Repeat(field.Bytes()[:1], 1000)
		sent := 0
		for ; ok && sent < 100_000; sent++ {
			ok = r.write(func() error { return r.WriteContinuation(1, false, piece) })
		}
		if ok {
			t.Errorf("the server took %d pieces", sent)
		}
		<-r.closed
	},
	"rapid reset": func(_ *testing.T, r *rawHTTP2, call string) {
		block := request(call)
		ok := true
		for i := uint32(0); ok && i < 100_000; i++ {
			ok = r.open(2*i+1, block) && r.write(func() error { return r.WriteRSTStream(2*i+1, http2.ErrCodeCancel) })
		}
	},
	"unknown frames": func(_ *testing.T, r *rawHTTP2, call string) {
		for i := range 6000 {
			kind := http2.FrameType(0x0a + i%6)
			if !r.write(func() error { return r.WriteRawFrame(kind, 0xff, uint32(i%3), make([]byte, 1000)) }) {
				return
			}
		}
		r.answers(1, request(call)) // they are to be ignored (RFC 9113 section 4.1)
	},
	"pings": func(_ *testing.T, r *rawHTTP2, _ string) {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for ok := true; ok; <-tick.C {
			ok = r.write(func() error { return r.WritePing(false, [8]byte{}) })
		}
		r.awaits("ENHANCE_YOUR_CALM", func() bool { return r.told && r.goAway == http2.ErrCodeEnhanceYourCalm })
	},
	"settings": func(_ *testing.T, r *rawHTTP2, _ string) {
		for i, ok := 0, true; ok && i < 50_000; i++ {
			ok = r.write(func() error { return r.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20}) })
		}
	},
	"empty frames": func(_ *testing.T, r *rawHTTP2, call string) {
		ok := r.open(1, request(call))
		for i := 0; ok && i < 50_000; i++ {
			ok = r.write(func() error { return r.WriteData(1, false, nil) })
		}
	},
}

// NEG-28: whatever a peer does to HTTP/2, memory stays bounded and others are
// served, on the agents' port, the operators' socket and the workloads' socket.
func TestTransportAttacksHarmNobodyElse(t *testing.T) {
	const growth = 64 << 20
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	s.CreateEntry(a.ID, "spiffe://example.org/w")
	if _, err := fetch(t, a, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	port := fmt.Sprintf("127.0.0.1:%d", s.Port)
	for _, to := range []target{
		{"agents' port", "tcp", port, "/assay.agent.v1.Agent/Bundle", s.Server, func() {
			dialHTTP2(t, "tcp", port).answers(1, request("/assay.agent.v1.Agent/Bundle"))
		}},
		{"operators' socket", "unix", s.AdminSocket(), "/assay.admin.v1.Admin/Status", s.Server, func() { s.CLI("status") }},
		{"workloads' socket", "unix", a.Socket(), "/SpiffeWorkloadAPI/FetchJWTBundles", a.Process, func() {
			if _, err := fetch(t, a, time.Minute); err != nil {
				t.Error(err)
			}
		}},
	} {
		for name, attack := range attacks {
			t.Run(to.name+"/"+name, func(t *testing.T) {
				before := peakRSS(t, to.process.PID())
				attack(t, dialHTTP2(t, to.network, to.address), to.call)
				to.alive()
				if grown := peakRSS(t, to.process.PID()) - before; grown > growth {
					t.Errorf("%d MiB more memory", grown>>20)
				}
			})
		}
	}
}

// NEG-20: strangers who say nothing, who say half of something, and who say too
// much. A node beside them renews its certificate and its workloads', time and
// again, and misses nothing.
func TestFloodOfStrangersDelaysNobody(t *testing.T) {
	const growth = 64 << 20
	s := newSite(t, shortTTL+"attestation:\n  agent_svid_ttl: 12s\n")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	s.CreateEntry(a.ID, "spiffe://example.org/w")
	first, err := fetch(t, a, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	before := peakRSS(t, s.Server.PID())

	var silent, refused, cut, others atomic.Int64
	flood, end := context.WithCancel(t.Context())
	defer end()
	var floods sync.WaitGroup
	defer floods.Wait()
	// From an address of their own, as strangers have one.
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	port := fmt.Sprintf("127.0.0.1:%d", s.Port)
	var opened sync.WaitGroup
	for range 50 {
		opened.Add(1)
		floods.Go(func() {
			var conns []net.Conn
			for range 100 {
				conn, err := from.Dial("tcp", port)
				if err != nil {
					t.Errorf("connect: %v", err)
					break
				}
				conns = append(conns, conn)
			}
			opened.Done()
			for _, conn := range conns {
				if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("silent connection: %v", err)
				}
				_ = conn.Close()
				silent.Add(1)
			}
		})
	}
	opened.Wait()
	attest := func(dialer *net.Dialer) {
		conn, err := grpc.NewClient("passthrough:///"+port,
			grpc.WithTransportCredentials(rpc.ClientTLSUnverified()),
			grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
				return dialer.DialContext(ctx, "tcp", address)
			}))
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		client := agentv1.NewAgentClient(conn)
		// Half-open ones, until the server ends them.
		var halves sync.WaitGroup
		for range 10 {
			halves.Go(func() {
				stream, err := client.Attest(flood)
				if err == nil {
					_, err = stream.Recv()
				}
				switch {
				case flood.Err() != nil:
				case fault.ReasonOf(fault.FromStatus(err)) == "attest_timeout":
					cut.Add(1)
				case status.Code(err) == codes.ResourceExhausted:
					refused.Add(1)
				default:
					others.Add(1) // no place among the connections
				}
			})
		}
		halves.Wait()
		// Whole ones, with a token that is none.
		for flood.Err() == nil {
			stream, err := client.Attest(flood)
			if err == nil {
				_ = stream.Send(&agentv1.AttestRequest{Step: &agentv1.AttestRequest_Start_{Start: &agentv1.AttestRequest_Start{
					Attestor: "join_token", Payload: []byte("guess"), Csr: []byte("nonsense"),
				}}})
				_, err = stream.Recv()
			}
			switch {
			case flood.Err() != nil:
			case status.Code(err) == codes.ResourceExhausted:
				refused.Add(1)
			default:
				others.Add(1)
			}
		}
	}
	elsewhere := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 3)}}
	for range 8 {
		floods.Go(func() { attest(elsewhere) })
	}

	// Beside it: two generations of the agent's certificate, three of the
	// workload's.
	renewals := func() float64 {
		return harness.Metric(t, a.Ops, `assay_agent_node_attempts_total{result="ok",step="renew"}`)
	}
	had := renewals()
	a.Eventually(2*time.Minute, "renewals", func() error {
		if n := renewals() - had; n < 2 {
			return fmt.Errorf("%v renewals of the agent", n)
		}
		return nil
	})
	second, err := fetch(t, a, 30*time.Second)
	if err != nil || second == first {
		t.Errorf("the workload has %s, had %s: %v", second, first, err)
	}
	for _, series := range []string{`assay_agent_node_attempts_total{result="failed",step="renew"}`, `assay_agent_node_attempts_total{result="ok",step="rejoin"}`} {
		if n := harness.Metric(t, a.Ops, series); n > 0 {
			t.Errorf("%s is %v", series, n)
		}
	}
	s.Server.Eventually(3*time.Minute, "the end of the silent and the slow", func() error {
		if silent.Load() < 5000 || cut.Load() == 0 || refused.Load() < 1000 {
			return fmt.Errorf("%d of 5000 are closed, %d attestations cut off, %d refused", silent.Load(), cut.Load(), refused.Load())
		}
		return nil
	})
	end()
	floods.Wait()
	t.Logf("attestations: %d timed out, %d refused, %d other", cut.Load(), refused.Load(), others.Load())
	if n := harness.Metric(t, s.Ops, `assay_limit_refusals_total{reason="attest_rate",server="agents"}`); n < 1000 {
		t.Errorf("attest_rate counts %v", n)
	}
	// Nor does it fill the disk: the log has some of the refusals, and how many
	// more there were.
	if log, err := os.ReadFile(s.File("server.log")); err != nil || bytes.Count(log, []byte("call refused")) > 2000 || !bytes.Contains(log, []byte("suppressed=")) {
		t.Errorf("%d refusals in the log, %v", bytes.Count(log, []byte("call refused")), err)
	}
	if n := harness.Metric(t, s.Ops, `assay_limit_refusals_total{reason="limit_anonymous_connections",server="agents"}`); n < 4000 {
		t.Errorf("limit_anonymous_connections counts %v", n)
	}
	if grown := peakRSS(t, s.Server.PID()) - before; grown > growth {
		t.Errorf("%d MiB more memory", grown>>20)
	}
}
