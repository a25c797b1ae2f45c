package api

import (
	"sync/atomic"

	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/ca"
)

// bundleCache keeps the message of the bundle last asked for: a bundle is
// immutable and changes a few times a year. Its messages are shared, so nobody
// may change them.
type bundleCache struct {
	last atomic.Pointer[encodedBundle]
}

type encodedBundle struct {
	bundle  *ca.Bundle
	message *agentv1.TrustBundle
}

func (c *bundleCache) message(b *ca.Bundle) *agentv1.TrustBundle {
	if last := c.last.Load(); last != nil && last.bundle == b {
		return last.message
	}
	m := &agentv1.TrustBundle{TrustDomain: b.TrustDomain.Name(), Sequence: b.Sequence}
	for _, root := range b.Roots {
		m.X509Authorities = append(m.X509Authorities, &agentv1.Authority{
			Id: root.ID, Certificate: root.Certificate.Raw, Tainted: root.State == ca.Tainted, Retired: root.State == ca.Retired,
		})
	}
	c.last.Store(&encodedBundle{bundle: b, message: m})
	return m
}
