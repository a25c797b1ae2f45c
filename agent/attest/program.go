package attest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// UnixConfig is the agent's `attestation.unix` section.
type UnixConfig struct {
	// DiscoverWorkloadPath adds the selectors unix:path and unix:sha256, of the
	// caller's program. The agent has to be allowed to read that program.
	// Default false.
	DiscoverWorkloadPath bool `yaml:"discover_workload_path"`
	// WorkloadSizeLimit is the size in bytes up to which a program is read for
	// unix:sha256; one that is larger has no such selector. Negative: none has.
	// Default 67108864 (64 MiB).
	WorkloadSizeLimit int64 `yaml:"workload_size_limit"`
}

const (
	defaultSizeLimit = 64 << 20
	// hashWorkers programs are read at a time, one per user.
	hashWorkers = 2
	// hashRate is how much of one user's programs is read per second, after a
	// first program of the largest size: a user who runs new programs all the
	// time takes a few percent of a core.
	hashRate = 64 << 20
	// maxPrograms bounds what is remembered, of programs and of users.
	maxPrograms = 4096
	// settled is the age from which a file's time of change tells any later
	// change: within one tick of the kernel's clock two look alike.
	settled = 2 * time.Second
)

// program is the executable of a pinned process. Its zero value is one that
// the agent may not read.
type program struct {
	link string // of the kernel's, under /proc
	id   exeID
}

// path returns where the program lies, empty if that can't be said. The
// kernel's text alone proves nothing: a process in a mount namespace of its own
// sees its program at any path that it likes. So the file at that path, as the
// agent sees it, has to be the very program.
func (p program) path() (string, error) {
	text, err := os.Readlink(p.link)
	if err != nil {
		return "", fmt.Errorf("read path of program: %w", err)
	}
	if id, err := statExe(text); err != nil || id != p.id {
		return "", nil // deleted, in memory alone, or in another mount namespace
	}
	return text, nil
}

// open opens the program itself, whatever lies at its path now.
func (p program) open() (*os.File, fileState, error) {
	f, err := os.OpenFile(p.link, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fileState{}, fmt.Errorf("open program: %w", err)
	}
	state, err := stateOf(f)
	if err == nil && state.id != p.id {
		err = errChanged
	}
	if err != nil {
		_ = f.Close()
		return nil, fileState{}, err
	}
	return f, state, nil
}

// fileState names a file's content: as long as it is the same, so is that.
type fileState struct {
	id              exeID
	size            int64
	changed, edited unix.StatxTimestamp
}

func stateOf(f *os.File) (fileState, error) {
	const want = unix.STATX_INO | unix.STATX_BTIME | unix.STATX_SIZE | unix.STATX_CTIME | unix.STATX_MTIME
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, want, &st); err != nil {
		return fileState{}, fmt.Errorf("stat program: %w", err)
	}
	return fileState{exeID{st.Dev_major, st.Dev_minor, st.Ino, st.Btime}, int64(st.Size), st.Ctime, st.Mtime}, nil
}

// digests keeps the SHA-256 of programs, and keeps users from wearing the agent
// out with them.
type digests struct {
	limit   int64
	workers *semaphore.Weighted
	mu      sync.Mutex
	known   map[fileState]string
	users   map[uint32]*share
}

// share is what one user has of the workers.
type share struct {
	waiting int // guarded by digests.mu
	turn    *semaphore.Weighted
	budget  *rate.Limiter
}

func newDigests(limit int64) *digests {
	if limit == 0 {
		limit = defaultSizeLimit
	}
	return &digests{
		limit: limit, workers: semaphore.NewWeighted(hashWorkers),
		known: map[fileState]string{}, users: map[uint32]*share{},
	}
}

// of returns the SHA-256 of a program in hex, empty if it is too large.
func (d *digests) of(ctx context.Context, uid uint32, p program) (string, error) {
	f, state, err := p.open()
	if err != nil {
		return "", err
	}
	defer f.Close()
	if state.size > d.limit {
		return "", nil
	}
	if sum, ok := d.lookup(state); ok {
		return sum, nil
	}
	user := d.join(uid)
	defer d.leave(user)
	if err := user.turn.Acquire(ctx, 1); err != nil {
		return "", fmt.Errorf("wait for a turn to read the program: %w", err)
	}
	defer user.turn.Release(1)
	if sum, ok := d.lookup(state); ok { // the one before us had the same
		return sum, nil
	}
	if err := user.budget.WaitN(ctx, int(state.size)); err != nil {
		return "", fmt.Errorf("wait for the user's share of reading programs: %w", err)
	}
	if err := d.workers.Acquire(ctx, 1); err != nil {
		return "", fmt.Errorf("wait for a worker to read the program: %w", err)
	}
	defer d.workers.Release(1)
	return d.read(ctx, f, state)
}

// read hashes a file that has to be the same before and after.
func (d *digests) read(ctx context.Context, f *os.File, state fileState) (string, error) {
	hash := sha256.New()
	n, err := io.Copy(hash, &untilDone{ctx, io.LimitReader(f, state.size+1)})
	if err != nil {
		return "", fmt.Errorf("read program: %w", err)
	}
	after, err := stateOf(f)
	if err != nil {
		return "", err
	}
	if after != state || n != state.size {
		return "", errChanged
	}
	sum := hex.EncodeToString(hash.Sum(nil))
	if time.Since(time.Unix(state.changed.Sec, int64(state.changed.Nsec))) > settled {
		d.remember(state, sum)
	}
	return sum, nil
}

// untilDone is a reader that gives up with its context.
type untilDone struct {
	ctx  context.Context //nolint:containedctx // a reader for one call of io.Copy
	from io.Reader
}

func (r *untilDone) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.from.Read(b)
}

func (d *digests) lookup(state fileState) (string, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	sum, ok := d.known[state]
	return sum, ok
}

func (d *digests) remember(state fileState, sum string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.known) >= maxPrograms {
		clear(d.known)
	}
	d.known[state] = sum
}

func (d *digests) join(uid uint32) *share {
	d.mu.Lock()
	defer d.mu.Unlock()
	user := d.users[uid]
	if user == nil {
		user = &share{turn: semaphore.NewWeighted(1), budget: rate.NewLimiter(hashRate, int(d.limit))}
		d.users[uid] = user
	}
	user.waiting++
	return user
}

// leave forgets users who have their whole budget again, once there are many.
func (d *digests) leave(user *share) {
	d.mu.Lock()
	defer d.mu.Unlock()
	user.waiting--
	if len(d.users) < maxPrograms {
		return
	}
	for uid, user := range d.users {
		if user.waiting == 0 && user.budget.Tokens() >= float64(d.limit) {
			delete(d.users, uid)
		}
	}
}

// program adds the selectors of p's executable. A program that the agent may
// not read has none.
func (u *Unix) program(ctx context.Context, b *setBuilder, p Process) error {
	if !u.config.DiscoverWorkloadPath || p.program.id == (exeID{}) {
		return nil
	}
	path, err := p.program.path()
	if err != nil {
		return err
	}
	b.text("path", path)
	if u.digests.limit < 0 {
		return nil
	}
	sum, err := u.digests.of(ctx, p.UID, p.program)
	if errors.Is(err, os.ErrPermission) {
		return nil
	}
	b.text("sha256", sum)
	return err
}
