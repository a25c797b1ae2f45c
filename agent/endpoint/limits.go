package endpoint

import (
	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Limits are the agent's `limits` section. They keep one user of the node from
// taking the Workload API away from the others. What is beyond them is answered
// with Unavailable load_shed, or closed.
type Limits struct {
	// Descriptors bounds the open files spent on callers: one for each
	// connection, and one for each process that has any (two on hosts with
	// cgroup v1). Default: what the process may open less an eighth for itself,
	// at most 16384.
	Descriptors int `yaml:"descriptors"`
	// DescriptorsPerUID bounds the same for one user. Default: three quarters.
	DescriptorsPerUID int `yaml:"descriptors_per_uid"`
	// Streams bounds open RPCs. An idle one takes about 12 KB. At most a quarter
	// of them may be SDS streams, whose requests may be larger. Default 16384.
	Streams int `yaml:"streams"`
	// StreamsPerUID bounds the same for one user. Default: three quarters.
	StreamsPerUID int `yaml:"streams_per_uid"`
	// Held bounds the callers without an identity that wait for one; those
	// beyond are answered at once. Default 4096.
	Held int `yaml:"held"`
	// HeldPerUID bounds the same for one user. Default: half.
	HeldPerUID int `yaml:"held_per_uid"`
}

const (
	maxDescriptors = 16384
	minReserve     = 64 // files that the agent needs for everything else
)

// withDefaults fills what is zero in.
func (l Limits) withDefaults() Limits {
	if l.Descriptors == 0 {
		l.Descriptors = maxDescriptors
		var open unix.Rlimit
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &open) == nil && open.Cur < 2*maxDescriptors {
			l.Descriptors = max(16, min(maxDescriptors, int(open.Cur)-max(minReserve, int(open.Cur)/8)))
		}
	}
	set := func(field *int, value int) {
		if *field == 0 {
			*field = max(1, value)
		}
	}
	set(&l.DescriptorsPerUID, l.Descriptors*3/4)
	set(&l.Streams, 16384)
	set(&l.StreamsPerUID, l.Streams*3/4)
	set(&l.Held, 4096)
	set(&l.HeldPerUID, l.Held/2)
	return l
}

// Check says whether the limits make sense.
func (l Limits) Check() error {
	for name, pair := range map[string][2]int{
		"descriptors": {l.Descriptors, l.DescriptorsPerUID},
		"streams":     {l.Streams, l.StreamsPerUID},
		"held":        {l.Held, l.HeldPerUID},
	} {
		if pair[0] < 0 || pair[1] < 0 {
			return fault.Newf(fault.Precondition, "config_limits", "limits.%s and limits.%s_per_uid can't be negative: leave them out for the default", name, name)
		}
		if pair[0] > 0 && pair[1] > pair[0] {
			return fault.Newf(fault.Precondition, "config_limits", "limits.%s_per_uid is above limits.%s: lower it to at most %d", name, name, pair[0])
		}
	}
	return nil
}
