package audit

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// fullFor is how long after a try without space Err says so.
const fullFor = 10 * time.Second

// Log is an open audit log. All its methods may be called concurrently.
type Log struct {
	path     string
	maxBytes int64
	keep     int
	build    string
	log      *slog.Logger
	disk     disk

	mu     sync.Mutex
	gather *batch // what the next write will take along; nil: nobody waits

	failed atomic.Pointer[error] // set once: the log takes no more lines
	fullAt atomic.Int64          // when the last write found no space, zero: it found some

	// turn has one token. Its holder is the only one who touches what follows.
	turn     chan struct{}
	file     *os.File
	size     int64  // bytes that are known to be on disk
	rotateAt int64  // size at which the next file is due
	seq      uint64 // number of the last line
	head     digest // hash of the last line
	buf      []byte
	reached  int64        // the store's revision that the last line names
	revision func() int64 // the store's now; nil before Follow
}

// Reached is the store's revision that the last line names: a store that has
// not come as far is not the one that the log went along with. Zero if no line
// names one.
func (l *Log) Reached() int64 {
	<-l.turn
	defer func() { l.turn <- struct{}{} }()
	return l.reached
}

// Follow has every line from now on name the revision that the store has
// reached. revision must not block, and must not name what could be lost in a
// power cut.
func (l *Log) Follow(revision func() int64) {
	<-l.turn
	defer func() { l.turn <- struct{}{} }()
	l.revision = revision
}

// disk is what a disk can refuse. Tests refuse in its place.
type disk struct {
	write    func(f *os.File, p []byte, off int64) (int, error)
	sync     func(f *os.File) error
	truncate func(f *os.File, size int64) error
}

func realDisk() disk {
	return disk{
		write: func(f *os.File, p []byte, off int64) (int, error) {
			n, err := f.WriteAt(p, off)
			if at, ok := errors.AsType[*fs.PathError](err); ok {
				err = at.Err // the name under which the file was made misleads
			}
			return n, err
		},
		truncate: (*os.File).Truncate,
		sync: func(f *os.File) error {
			for {
				if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
					return err
				}
			}
		},
	}
}

// batch is the lines of everybody who came while the disk was busy.
type batch struct {
	body []byte // what their callers know of the lines, one after the other
	ends []int  // where each ends in body
	done chan struct{}
	err  error // valid when done is closed
}

// Record returns when all lines are on disk, one after the other and in this
// order. After an error nothing may be answered that a line stands for, whether
// or not it is found in the log later. A ctx that ends gives up the wait, not
// the lines.
func (l *Log) Record(ctx context.Context, lines ...Line) error {
	if len(lines) == 0 {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return interrupted(err)
	}
	body := make([]byte, 0, 768*len(lines))
	ends := make([]int, len(lines))
	for i := range lines {
		body = appendLine(body, &lines[i])
		ends[i] = len(body)
	}
	b, lead := l.join(body, ends)
	if lead {
		return l.lead(ctx, b)
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return interrupted(ctx.Err())
	}
}

// Err says why lines can't be recorded at present, nil if they can as far as is
// known. It is for readiness checks and does not touch the disk. A full disk is
// told for ten seconds after the last try: a server that is kept from requests
// until it is ready would otherwise never try again.
func (l *Log) Err() error {
	if p := l.failed.Load(); p != nil {
		return *p
	}
	if at := l.fullAt.Load(); at != 0 && time.Since(time.Unix(0, at)) < fullFor {
		return errFull(nil)
	}
	return nil
}

// Close waits for the write under way and closes the file. Lines recorded later
// are refused.
func (l *Log) Close() error {
	<-l.turn
	defer func() { l.turn <- struct{}{} }()
	if l.file == nil {
		return nil
	}
	_ = l.fail(errors.New("the log is closed")) // what later callers get
	err := l.file.Close()
	l.file = nil
	if err != nil {
		return fmt.Errorf("close audit log: %w", err)
	}
	return nil
}

// join puts lines into the batch that is being gathered. Whoever begins a batch
// leads it.
func (l *Log) join(body []byte, ends []int) (b *batch, lead bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.gather == nil {
		l.gather = &batch{body: body, ends: ends, done: make(chan struct{})}
		return l.gather, true
	}
	b = l.gather
	offset := len(b.body)
	b.body = append(b.body, body...)
	for _, end := range ends {
		b.ends = append(b.ends, offset+end)
	}
	return b, false
}

// lead waits for the turn, during which others join, and writes the batch.
func (l *Log) lead(ctx context.Context, b *batch) error {
	<-l.turn
	l.mu.Lock()
	l.gather = nil
	l.mu.Unlock()

	finished := false
	defer func() {
		if !finished { // a panic must neither hang the others nor be taken for success
			b.err = l.fail(errors.New("the writer did not finish"))
		}
		close(b.done)
		l.turn <- struct{}{}
	}()
	b.err = l.commit(ctx, b)
	finished = true
	return b.err
}

// commit makes a batch durable or leaves the log as it was.
func (l *Log) commit(ctx context.Context, b *batch) error {
	if p := l.failed.Load(); p != nil {
		return *p
	}
	if err := l.ours(ctx); err != nil {
		return err
	}
	seq, head, err := l.chain(b)
	if err != nil {
		return err
	}
	if l.size > 0 && l.size+int64(len(l.buf)) > l.rotateAt {
		if err := l.rotate(ctx); err != nil {
			return err
		}
	}
	if err := l.write(); err != nil {
		return err
	}
	l.seq, l.head = seq, head
	l.size += int64(len(l.buf))
	l.fullAt.Store(0)
	return nil
}

// chain numbers and links the lines of a batch into l.buf and returns the
// number and hash of the last.
func (l *Log) chain(b *batch) (uint64, digest, error) {
	var boot unix.Timespec
	// The boot clock goes on during suspend and can't be set: beside it, a wall
	// clock that was moved shows.
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		return 0, digest{}, fault.Wrap(fault.NotReady, err, "audit_failed", "the boot clock can't be read")
	}
	if l.revision != nil {
		l.reached = l.revision()
	}
	s := stamp{seq: l.seq, prev: l.head, wall: time.Now(), mono: time.Duration(boot.Nano()), revision: l.reached}
	l.buf = l.buf[:0]
	begin := 0
	for _, end := range b.ends {
		s.seq++
		first := len(l.buf)
		l.buf = appendHead(l.buf, s)
		l.buf = append(l.buf, b.body[begin:end]...)
		l.buf = appendTail(l.buf, l.build)
		s.prev = sha256.Sum256(l.buf[first:])
		l.buf = append(l.buf, '\n')
		begin = end
	}
	return s.seq, s.prev, nil
}

// write puts l.buf behind the last line.
func (l *Log) write() error {
	_, err := l.disk.write(l.file, l.buf, l.size)
	if err == nil {
		if err = l.disk.sync(l.file); err == nil {
			return nil
		}
		// After a failed sync the kernel may count the pages as clean. Only of
		// a full disk it is known that they were never written.
		if !noSpace(err) {
			return l.fail(err)
		}
	}
	return l.takeBack(err)
}

// takeBack cuts off what a failed write left. If even that is not certain the
// log is failed.
func (l *Log) takeBack(cause error) error {
	if err := l.disk.truncate(l.file, l.size); err != nil {
		return l.fail(errors.Join(cause, err))
	}
	if err := l.disk.sync(l.file); err != nil {
		return l.fail(errors.Join(cause, err))
	}
	if noSpace(cause) {
		return l.noSpace(cause)
	}
	return fault.Wrap(fault.NotReady, cause, "audit_failed", "the audit log can't be written: nothing was done; see the server's log and its disk")
}

// ours makes sure that the file at path is the open one and ends where the last
// line ended. A file that was moved away gets a successor, so that the lines
// are found where they are looked for; anything else is not written to.
func (l *Log) ours(ctx context.Context) error {
	at, err := os.Lstat(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		l.log.LogAttrs(ctx, slog.LevelWarn, "audit log was moved away or removed: beginning a new file; rotation is the server's own work",
			slog.String("path", l.path))
		return l.succeed()
	}
	if err != nil {
		return fault.Wrap(fault.NotReady, err, "audit_failed", "the audit log's path can't be looked up: mend its directory")
	}
	open, err := l.file.Stat()
	if err != nil {
		return fault.Wrap(fault.NotReady, err, "audit_failed", "the audit log can't be looked at")
	}
	if !os.SameFile(at, open) || open.Size() != l.size {
		// The text goes to peers: where the file lies is for the log.
		return fault.Wrap(fault.NotReady, fmt.Errorf("%s is not the file that was written last", l.path), "audit_failed",
			"the audit log was replaced or changed by another program: put the file back, or restart the server to go on from what is there")
	}
	return nil
}

// fail makes the log refuse everything from now on.
func (l *Log) fail(cause error) error {
	err := fault.Wrap(fault.NotReady, cause, "audit_failed",
		"the audit log's state is unknown after an error: mend the disk, then restart the server")
	l.failed.CompareAndSwap(nil, &err)
	return *l.failed.Load()
}

func (l *Log) noSpace(cause error) error {
	l.fullAt.Store(time.Now().UnixNano())
	return errFull(cause)
}

func errFull(cause error) error {
	return fault.Wrap(fault.Exhausted, cause, "audit_full", "no space for the audit log: nothing was done; free space on its disk, it goes on by itself")
}

func interrupted(cause error) error {
	return fault.Wrap(fault.NotReady, cause, "audit_interrupted", "the request ended before its audit line was on disk")
}

func noSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
