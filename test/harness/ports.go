package harness

import (
	"fmt"
	"math/rand/v2"
	"net"
)

// Ports gives away TCP ports of the loopback, none of them twice.
type Ports struct{ given map[int]bool }

// Free returns a port that nobody listens on. It lies below the ports that the
// kernel gives to outgoing connections, so that it is still free when its owner
// restarts.
func (p *Ports) Free(tb TB) int {
	tb.Helper()
	for range 100 {
		port := 10000 + rand.IntN(20000)
		lis, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		_ = lis.Close()
		if p.given == nil {
			p.given = map[int]bool{}
		}
		if !p.given[port] {
			p.given[port] = true
			return port
		}
	}
	tb.Fatalf("found no free port")
	return 0
}
