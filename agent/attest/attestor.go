package attest

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"

	"golang.org/x/time/rate"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// hostPIDNamespace is the inode of the initial PID namespace
// (PROC_PID_INIT_INO in the kernel's proc_ns.h).
const hostPIDNamespace = "pid:[4026531836]"

// Config is the agent's `attestation` section as far as it concerns callers.
type Config struct {
	// RequireHostPID refuses to start outside the host's PID namespace, where
	// the pids of callers can't be resolved. Units and charts set it.
	RequireHostPID bool `yaml:"require_host_pid"`
	// Unix says what is told of every process.
	Unix UnixConfig `yaml:"unix"`
	// K8S says how pods are told apart, on a node that attests by k8s_psat.
	K8S K8SConfig `yaml:"k8s"`
}

// Process is a caller as the kernel described it when its connection was
// pinned.
type Process struct {
	PID      int32 // valid while the process is pinned, else a hint
	UID, GID uint32
	Groups   []uint32 // supplementary
	Cgroup   string   // the content of /proc/<pid>/cgroup
	program  program
}

// Source turns a process into selectors. It returns all that it stands for or
// an error: never a part.
type Source interface {
	Selectors(ctx context.Context, p Process) (selector.Set, error)
}

// Options are what NewAttestor needs.
type Options struct {
	Config Config
	// Sources by name, as it appears in logs. Empty means the unix source alone.
	Sources map[string]Source
	Log     *slog.Logger
}

// Attestor pins callers and attests them.
type Attestor struct {
	sources   []namedSource
	log       *slog.Logger
	kernel    kernel
	overflow  id // uid and gid that stand for "not mapped here"
	processes processes
	failures  *rate.Limiter // lines of the log: users can bring failures about
}

// failureLines per second are logged of attestations that failed.
const failureLines = 10

type namedSource struct {
	name string
	Source
}

type id struct{ uid, gid uint32 }

// NewAttestor probes what the kernel offers. It fails if callers could not be
// attested at all, or not as cfg demands.
func NewAttestor(o Options) (*Attestor, error) {
	if err := checkPIDNamespace(o); err != nil {
		return nil, err
	}
	k, err := probeKernel()
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "kernel_unsupported",
			"this kernel has no pidfd_open: the agent needs Linux 5.3 or newer, better 6.5")
	}
	a := &Attestor{
		log: o.Log, kernel: k, processes: processes{byInode: map[uint64]*process{}},
		failures: rate.NewLimiter(failureLines, failureLines),
	}
	if a.overflow, err = overflowIDs(); err != nil {
		return nil, err
	}
	if len(o.Sources) == 0 {
		o.Sources = map[string]Source{"unix": NewUnix(o.Config.Unix)}
	}
	for _, name := range slices.Sorted(maps.Keys(o.Sources)) {
		a.sources = append(a.sources, namedSource{name, o.Sources[name]})
	}
	return a, nil
}

// Mode says how callers are pinned: "pidfd", or "peercred" where the kernel
// lacks SO_PEERPIDFD and a short race remains.
func (a *Attestor) Mode() string {
	if pinned && a.kernel.peerPidfd {
		return "pidfd"
	}
	return "peercred"
}

// Descriptors returns how many files this attestor holds open.
func (a *Attestor) Descriptors() int { return a.processes.descriptors() }

// attest asks all sources. One failure is a failure of the whole: entries are
// matched against complete sets only (NEG-39).
func (a *Attestor) attest(ctx context.Context, p Process) (selector.Set, error) {
	var all []selector.Selector
	for _, s := range a.sources {
		set, err := s.Selectors(ctx, p)
		if err != nil {
			if a.failures.Allow() {
				a.log.LogAttrs(ctx, slog.LevelWarn, "workload attestation failed", slog.String("attestor", s.name),
					slog.Int64("pid", int64(p.PID)), slog.Uint64("uid", uint64(p.UID)), slog.String("error", err.Error()))
			}
			if fault.KindOf(err) == fault.Denied { // it is certain that the caller can't be told apart
				return nil, fault.Wrap(fault.Denied, fmt.Errorf("attestor %s: %w", s.name, err), fault.ReasonOf(err), "no identity issued")
			}
			return nil, fault.Wrap(fault.NotReady, fmt.Errorf("attestor %s: %w", s.name, err), "attestation_failed",
				"workload attestation failed; retry, and see the agent's log if it stays")
		}
		all = append(all, set...)
	}
	return selector.NewSet(all...), nil
}

func checkPIDNamespace(o Options) error {
	if self, err := os.Readlink("/proc/self"); err != nil || self != strconv.Itoa(os.Getpid()) {
		return fault.New(fault.Precondition, "proc_unusable",
			"/proc is not mounted or belongs to another PID namespace: mount it for the agent's own")
	}
	ns, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return fmt.Errorf("read own PID namespace: %w", err)
	}
	if ns == hostPIDNamespace {
		return nil
	}
	if o.Config.RequireHostPID {
		return fault.New(fault.Precondition, "needs_host_pid",
			"the agent is not in the host's PID namespace (hostPID: true), or unset attestation.require_host_pid")
	}
	o.Log.Warn("the agent is not in the host's PID namespace: callers outside of it are refused", slog.String("namespace", ns))
	return nil
}

// overflowIDs reads the ids that the kernel shows for users and groups without
// a mapping in our user namespace.
func overflowIDs() (id, error) {
	uid, err := readID("/proc/sys/kernel/overflowuid")
	if err != nil {
		return id{}, err
	}
	gid, err := readID("/proc/sys/kernel/overflowgid")
	return id{uid, gid}, err
}

func readID(path string) (uint32, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read overflow id: %w", err)
	}
	n, err := strconv.ParseUint(string(bytes.TrimSpace(data)), 10, 32)
	if err != nil {
		return 0, fmt.Errorf("parse %s: %w", path, err)
	}
	return uint32(n), nil
}
