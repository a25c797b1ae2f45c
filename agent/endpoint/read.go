package endpoint

import (
	"errors"
	"io"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/mem"
)

// reader reads from a connection into a buffer that it takes only once there is
// something to read. gRPC asks connections for that (ReadOnReady); it keeps
// thousands of idle connections from each pinning a read buffer.
type reader struct {
	raw syscall.RawConn
	try func(fd uintptr) bool // a field, so that reading does not allocate it

	// Of the read under way; gRPC has one reader.
	size int
	pool mem.BufferPool
	buf  *[]byte
	n    int
	err  error
}

func newReader(raw syscall.RawConn) *reader {
	r := &reader{raw: raw}
	r.try = r.attempt
	return r
}

// attempt returns false to wait until the descriptor is readable.
func (r *reader) attempt(fd uintptr) bool {
	r.buf = r.pool.Get(r.size)
	for {
		r.n, r.err = unix.Read(int(fd), *r.buf)
		if !errors.Is(r.err, unix.EINTR) {
			break
		}
	}
	if r.err == nil && r.n > 0 {
		return true
	}
	r.pool.Put(r.buf)
	r.buf, r.n = nil, max(r.n, 0)
	return !errors.Is(r.err, unix.EAGAIN)
}

// ReadOnReady implements what gRPC looks for in a connection.
func (r *reader) ReadOnReady(size int, pool mem.BufferPool) (*[]byte, int, error) {
	r.size, r.pool = size, pool
	err := r.raw.Read(r.try)
	buf, n := r.buf, r.n
	if err == nil {
		err = r.err
	}
	r.pool, r.buf, r.err = nil, nil, nil
	switch {
	case buf != nil:
		return buf, n, nil
	case err == nil:
		return nil, 0, io.EOF
	}
	return nil, 0, err
}
