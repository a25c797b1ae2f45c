//go:build root

package endpoint

import (
	"os/exec"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
)

func TestOneUserCannotTakeAllDescriptors(t *testing.T) { // NEG-43
	var open unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &open); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 256, Max: open.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &open); err != nil {
			t.Fatal(err)
		}
	}()
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	flood := startClient(t, "flood", e.path, func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4321, Gid: 4321}}
	})
	flood.await("flooded")
	// Until each of its connections is judged it takes descriptors: who comes in
	// that moment tries again, as every client does.
	other := e.client()
	until(t, "somebody else is served", func() bool {
		stream, err := other.FetchX509SVID(withHeader(t), &workload.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		return err == nil
	})
	for range 10 {
		recv(t, fetch(t, e.client(), withHeader(t)))
	}
	if n := e.value("assay_workload_denials_total", "load_shed"); n == 0 {
		t.Fatal("the flood was not held off")
	}
}
