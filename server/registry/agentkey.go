package registry

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// keyIndex has the agents by the hashes of the keys that are certified for
// them, active and pending.
type keyIndex map[string]*agentItem

func (x keyIndex) put(a *agentItem) {
	for _, key := range []string{a.ActiveKey, a.PendingKey} {
		if key != "" {
			x[key] = a
		}
	}
}

func (x keyIndex) remove(a *agentItem) {
	for _, key := range []string{a.ActiveKey, a.PendingKey} {
		if x[key] == a {
			delete(x, key)
		}
	}
}

// CheckKey refuses a key that is certified for another agent than id: two
// nodes hold the same private key. It looks into memory only, so of two agents
// that come with a new key at the same moment both may pass.
func (r *Registry) CheckKey(id spiffeid.ID, keyHash string) error {
	r.mirror.mu.RLock()
	holder := r.mirror.keys[keyHash]
	r.mirror.mu.RUnlock()
	if holder == nil || holder.ID == id {
		return nil
	}
	return fault.Wrap(fault.Denied, fmt.Errorf("the key is that of %s", holder.ID), agentv1.ReasonBindingMismatch,
		"this key is certified for another agent: make a new one; if both are one machine's image, delete data_dir on the copy")
}
