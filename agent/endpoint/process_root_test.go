//go:build root

package endpoint

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
)

func TestChangedCallerGetsNothing(t *testing.T) { // NEG-41, WL-26, SDS-14
	for _, socket := range []string{"api.sock", "sds.sock"} {
		t.Run(socket, func(t *testing.T) { change(t, socket) })
	}
}

func change(t *testing.T, socket string) {
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	c := startClient(t, "setuid", filepath.Join(filepath.Dir(e.path), socket))
	c.await("received")
	c.tell("")
	c.await("done")
	rotated := ca.snapshot(ca.svid("/a", ""))
	e.source.set(rotated, nil)
	if got, want := c.await("ended"), fmt.Sprint(codes.PermissionDenied, " caller_changed"); got != want {
		t.Fatalf("got %s, want %s", got, want)
	}
	if e.source.wasSent(rotated) {
		t.Fatal("the rotated key was delivered")
	}
}

func TestUsersAreToldApart(t *testing.T) { // WL-9, SDS-14
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	for uid, socket := range map[uint32]string{0: e.path, 77: e.path, 78: e.sds, 1337: e.sds} {
		c := startClient(t, "stay", socket, func(cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		})
		c.await("received")
		e.source.mu.Lock()
		got := e.source.selectors.Key()
		e.source.mu.Unlock()
		if want := fmt.Sprintf("uid:%d\x00", uid); !bytes.Contains([]byte(got), []byte(want)) {
			t.Fatalf("uid %d subscribed to %q", uid, got)
		}
		c.tell("")
	}
}
