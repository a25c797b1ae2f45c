package endpoint

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
)

// lockedBuffer is a log that can be read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// At info the log names a denied caller by uid and pid; what it looks like to
// the attestor is there at debug only.
func TestSelectorsOfADeniedCallerAreLoggedAtDebugOnly(t *testing.T) {
	selector := fmt.Sprintf("unix:uid:%d", os.Geteuid())
	who := fmt.Sprintf("uid=%d pid=%d", os.Geteuid(), os.Getpid())
	for _, level := range []slog.Level{slog.LevelInfo, slog.LevelDebug} {
		for _, denied := range []bool{true, false} {
			var log lockedBuffer
			src := &source{err: errNoIdentity}
			if !denied {
				src = &source{err: errPending}
			}
			e := serve(t, src, func(c *Config, waits *timing) {
				c.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: level}))
				waits.hold = 0
			})
			stream, err := e.client().FetchX509SVID(withHeader(t), &workload.X509SVIDRequest{})
			if err != nil {
				t.Fatal(err)
			}
			_, err = stream.Recv()
			if denied {
				wantStatus(t, err, codes.PermissionDenied, "no_identity")
			} else {
				wantStatus(t, err, codes.Unavailable, "svid_pending")
			}
			e.stop()
			var info, debug string
			for line := range strings.Lines(log.String()) {
				switch {
				case strings.Contains(line, "level=INFO") && strings.Contains(line, "reason=no_identity"):
					info = line
				case strings.Contains(line, "level=DEBUG") && strings.Contains(line, selector):
					debug = line
				}
			}
			if denied != strings.Contains(info, who) || strings.Contains(info, selector) {
				t.Errorf("%v, denied %v: %s", level, denied, log.String())
			}
			if want := denied && level == slog.LevelDebug; want != strings.Contains(debug, who) {
				t.Errorf("%v, denied %v: %s", level, denied, log.String())
			}
		}
	}
}
