package durable

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// kept is a listener that is looked after, with an echo behind it.
func kept(t *testing.T, path string) (k *KeptListener, told chan error) {
	t.Helper()
	k, err := KeepUnix(func() (*Listener, error) { return ListenUnix(path, 0o666) })
	if err != nil {
		t.Fatal(err)
	}
	told = make(chan error, 100)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{}, 2)
	go func() {
		k.Keep(ctx, func(err error) { told <- err })
		ended <- struct{}{}
	}()
	go func() {
		defer func() { ended <- struct{}{} }()
		for {
			c, err := k.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("accept: %v", err)
				}
				return
			}
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
	t.Cleanup(func() {
		_ = k.Close()
		cancel()
		<-ended
		<-ended
	})
	return k, told
}

func echo(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

func dialUnix(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func await(t *testing.T, told chan error) error {
	t.Helper()
	select {
	case err := <-told:
		return err
	case <-time.After(time.Minute):
		t.Fatal("nothing happened for a minute")
		return nil
	}
}

// NEG-44: a removed socket is back within 5 s, by how often it is looked at, as
// the machine may be busy with others; what was accepted goes on.
func TestRemovedSocketIsPutBackUnderItsConnections(t *testing.T) {
	if keepEvery > 5*time.Second/2 {
		t.Errorf("it is looked at every %v", keepEvery)
	}
	path := filepath.Join(t.TempDir(), "api.sock")
	k, told := kept(t, path)
	old := dialUnix(t, path)
	echo(t, old)
	for range 2 {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := await(t, told); err != nil {
			t.Fatal(err)
		}
		echo(t, dialUnix(t, path))
		echo(t, old)
		if !k.InPlace() {
			t.Error("not in place")
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("%v, %v", info, err)
	}
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the name stayed: %v", err)
	}
}

// NEG-44: what is no socket is never removed; once it is gone, ours is back.
func TestThingInTheSocketsPlaceIsLeftAloneAndToldOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	_, told := kept(t, path)
	if err := os.WriteFile(path+".new", []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	if err := await(t, told); fault.ReasonOf(err) != "path_untrusted" {
		t.Errorf("told %v", err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "precious" {
		t.Errorf("%q, %v", data, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := await(t, told); err != nil {
		t.Errorf("told twice: %v", err)
	}
	echo(t, dialUnix(t, path))
}
