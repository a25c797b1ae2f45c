package durable

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// keepEvery is how often a removed socket is looked for.
const keepEvery = 2 * time.Second

// KeptListener is a Listener that is put back when its path leads elsewhere:
// somebody removed the socket, or put another thing in its place (NEG-44).
// What it accepted before is not touched by that.
type KeptListener struct {
	open func() (*Listener, error)

	mu      sync.Mutex
	current *Listener
	closed  bool
}

// KeepUnix opens a listener that Keep can open again. open checks the path each
// time, as ListenUnix does: what must not be replaced stays.
func KeepUnix(open func() (*Listener, error)) (*KeptListener, error) {
	first, err := open()
	if err != nil {
		return nil, err
	}
	return &KeptListener{open: open, current: first}, nil
}

// Keep looks after the socket until ctx ends or the listener is closed. It
// tells of each time that the socket was gone: nil when it is back, else why it
// can't be; the same trouble once.
func (k *KeptListener) Keep(ctx context.Context, tell func(error)) {
	ticker := time.NewTicker(keepEvery)
	defer ticker.Stop()
	told := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if k.InPlace() {
			told = ""
			continue
		}
		switch back, err := k.putBack(); {
		case err != nil && err.Error() != told:
			told = err.Error()
			tell(err)
		case err == nil && !back:
			return // closed
		case err == nil:
			told = ""
			tell(nil)
		}
	}
}

// putBack replaces the listener. The new one is there before the old one goes.
func (k *KeptListener) putBack() (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return false, nil
	}
	next, err := k.open()
	if err != nil {
		return false, err
	}
	old := k.current
	k.current = next
	_ = old.Close() // wakes Accept, which goes on with the new one
	return true, nil
}

// Accept implements net.Listener.
func (k *KeptListener) Accept() (net.Conn, error) {
	for {
		listener := k.listener()
		c, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) && k.listener() != listener {
			continue
		}
		return c, err
	}
}

// InPlace says whether the path leads to this listener.
func (k *KeptListener) InPlace() bool { return k.listener().InPlace() }

// Addr implements net.Listener.
func (k *KeptListener) Addr() net.Addr { return k.listener().Addr() }

// Close implements net.Listener.
func (k *KeptListener) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	return k.current.Close()
}

func (k *KeptListener) listener() *Listener {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.current
}
