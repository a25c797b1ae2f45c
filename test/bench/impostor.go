package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/seed-caa81108/assay/test/harness"
)

const impostors = 100

// connectThenExec measures what docs/security.md calls no boundary: a child
// connects a socket that it shares with its parent, then becomes another
// program of the same user; the parent asks over the socket.
func (b *bench) connectThenExec(a *harness.Agent) {
	served := 0
	for range impostors {
		if b.impostor(a.Socket()) {
			served++
		}
	}
	b.add("connect, then exec within one uid: served (no boundary)", fmt.Sprintf("%d of %d", served, impostors), "", "", "stated")
}

func (b *bench) impostor(socket string) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	b.must(err)
	shared := os.NewFile(uintptr(fd), "shared")
	defer func() { _ = shared.Close() }()
	child := exec.Command("/proc/self/exe", "-impostor", socket)
	child.ExtraFiles = []*os.File{shared}
	b.must(child.Start())
	defer func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	}()
	for deadline := time.Now().Add(10 * time.Second); ; {
		if _, err := unix.Getpeername(fd); err == nil {
			break
		}
		if time.Now().After(deadline) {
			b.Fatalf("the child did not connect")
		}
	}
	conn, err := net.FileConn(shared)
	b.must(err)
	defer func() { _ = conn.Close() }()
	used := false
	cc, err := grpc.NewClient("passthrough:shared", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if used {
				return nil, errors.New("one connection only")
			}
			used = true
			return conn, nil
		}))
	b.must(err)
	defer func() { _ = cc.Close() }()
	ctx, cancel := context.WithTimeout(b.workload("unix://"+socket).ctx, time.Second)
	defer cancel()
	return (&workloadClient{api: workload.NewSpiffeWorkloadAPIClient(cc), ctx: ctx}).fetch() == nil
}

// becomeAnother is the child.
func becomeAnother(socket string) error {
	if err := unix.Connect(3, &unix.SockaddrUnix{Name: socket}); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	return unix.Exec("/bin/sleep", []string{"sleep", "5"}, nil)
}
