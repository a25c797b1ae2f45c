package endpoint

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

func TestMain(m *testing.M) {
	if part := os.Getenv(clientEnv); part != "" {
		if err := play(part, os.Getenv(socketEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// play is the main function of a client process.
func play(part, socket string) error {
	switch part {
	case "flood":
		return playFlood(socket)
	case "load":
		return playLoad(socket)
	case "idle":
		return playIdle(socket)
	}
	return playStream(part, socket)
}

// playFlood opens as many connections as it can for a while and keeps them.
func playFlood(socket string) error {
	var open []net.Conn
	for range 1000 {
		c, err := net.Dial("unix", socket)
		if err != nil {
			break // the backlog is full
		}
		open = append(open, c)
	}
	fmt.Println("flooded")
	_, _ = io.Copy(io.Discard, os.Stdin)
	for _, c := range open {
		_ = c.Close()
	}
	return nil
}

// playStream opens a stream, and does something else when it is told to.
func playStream(part, socket string) error {
	var mu sync.Mutex
	var conn *net.UnixConn
	dial := func(context.Context, string) (net.Conn, error) {
		c, err := net.Dial("unix", socket)
		if err == nil {
			mu.Lock()
			conn = c.(*net.UnixConn)
			mu.Unlock()
		}
		return c, err
	}
	cc, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(dial))
	if err != nil {
		return err
	}
	recv, err := openStream(cc, filepath.Base(socket) == "sds.sock")
	if err != nil {
		return err
	}
	if err := recv(); err != nil {
		return err
	}
	fmt.Println("received")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	switch part {
	case "stay":
		return nil
	case "pass":
		mu.Lock()
		defer mu.Unlock()
		file, err := conn.File()
		if err != nil {
			return err
		}
		return unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(file.Fd())), nil, 0)
	case "setuid":
		if err := syscall.Setuid(1234); err != nil {
			return err
		}
	}
	fmt.Println("done")
	err = recv()
	fmt.Println("ended", statusCode(err), reasonOf(err))
	return nil
}

// openStream opens a stream of one of the two APIs.
func openStream(cc *grpc.ClientConn, sds bool) (recv func() error, err error) {
	if !sds {
		ctx := metadata.AppendToOutgoingContext(context.Background(), headerKey, headerValue)
		stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		return func() error {
			_, err := stream.Recv()
			return err
		}, err
	}
	stream, err := secretv3.NewSecretDiscoveryServiceClient(cc).StreamSecrets(context.Background())
	if err != nil {
		return nil, err
	}
	return func() error {
		_, err := stream.Recv()
		return err
	}, stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}, Node: &corev3.Node{Id: "sidecar~10.0.0.1~victim.prod~prod.svc.cluster.local"}})
}

func TestPassedOnStreamGetsNothing(t *testing.T) { // NEG-41, WL-26, SDS-14
	for _, socket := range []string{"api.sock", "sds.sock"} {
		t.Run(socket, func(t *testing.T) { passOn(t, socket) })
	}
}

func passOn(t *testing.T, socket string) {
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, withTiming(func(w *timing) { w.grace = 50 * time.Millisecond }))
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "theirs")
	c := startClient(t, "pass", filepath.Join(filepath.Dir(e.path), socket), func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{theirs} })
	_ = theirs.Close()
	c.await("received")
	c.tell("")
	stolen := receive(t, pair[0])
	defer stolen.Close()
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
	rotated := ca.snapshot(ca.svid("/a", ""))
	e.source.set(rotated, nil)
	until(t, "stream ended", func() bool { return e.value("assay_workload_denials_total", "caller_gone") == 1 })
	e.stop()
	got, err := io.ReadAll(stolen)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(got, rotated.SVIDs[0].Key.DER()) || e.source.wasSent(rotated) {
		t.Fatal("the rotated key was delivered")
	}
}

func receive(t *testing.T, sock int) *os.File {
	t.Helper()
	data, rights := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(sock, data, rights, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	list, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&list[0])
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "stolen")
}
