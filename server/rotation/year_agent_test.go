package rotation_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/registry"
)

// held is a certificate in use.
type held struct {
	leaf, issuer *x509.Certificate
	serial, root string
	minted       bool
}

// node is an agent with its own certificate and that of one workload.
type node struct {
	y      *years
	id     spiffeid.ID
	slow   time.Duration // how long it needs to hand a bundle to its workloads
	key    *ecdsa.PrivateKey
	claims *registry.Claims

	bundle    *ca.Bundle // what it serves; under y.mu, as are the certificates
	own, work held
}

func (y *years) join(name string, slow time.Duration) *node {
	y.t.Helper()
	n := &node{y: y, id: spiffeid.RequireFromPath(td, "/assay/agent/x509pop/"+name), slow: slow, bundle: y.authority.Bundle(), key: newKey(y.t)}
	if err := y.registry.RecordAttested(y.t.Context(), n.id, "x509pop", nil, n.keyHash(), ""); err != nil {
		y.t.Fatal(err)
	}
	n.claims = y.registry.Connected(n.id, "test")
	y.mu.Lock()
	defer y.mu.Unlock()
	y.nodes = append(y.nodes, n)
	return n
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (n *node) keyHash() string { return fmt.Sprintf("%064x", n.slow) }

// run is the life of the agent.
func (n *node) run(ctx context.Context) {
	defer n.claims.Close()
	for n.renew(ctx) && n.rest(ctx) {
	}
}

// renew acknowledges the bundle that the node serves, replaces what is due, and
// reports.
func (n *node) renew(ctx context.Context) bool {
	n.claims.Ack(n.bundle.Sequence, time.Time{})
	if n.due(&n.own) && !n.renewOwn(ctx) {
		return false
	}
	if n.due(&n.work) {
		h, ok := n.y.issue(ctx, ca.X509Request{Kind: ca.Workload, ID: spiffeid.RequireFromPath(td, n.id.Path()[len("/assay"):]), PublicKey: n.key.Public(), Rule: "entry"})
		if !ok {
			return false
		}
		n.hold(&n.work, h)
	}
	n.claims.Report(registry.Report{
		Live:           []registry.LiveSVIDs{{AuthorityID: n.work.root, Count: 1, LatestExpiry: n.work.leaf.NotAfter}},
		EarliestExpiry: n.work.leaf.NotAfter, AgentTime: time.Now(),
	})
	return true
}

func (n *node) renewOwn(ctx context.Context) bool {
	under := n.own.serial
	h, ok := n.y.issue(ctx, ca.X509Request{Kind: ca.Agent, ID: n.id, PublicKey: n.key.Public(), Rule: "agent"})
	if !ok {
		return false
	}
	err := n.y.registry.RecordIssued(ctx, n.id, registry.Issued{Under: under, Serial: h.serial, KeyHash: n.keyHash(), NotAfter: h.leaf.NotAfter, Authority: h.root})
	if err == nil {
		_, err = n.y.registry.UseSerial(ctx, n.id, registry.Shown{Serial: h.serial})
	}
	if err != nil {
		if ctx.Err() == nil {
			n.y.t.Errorf("%v: %s renews its own: %v", time.Now(), n.id, err)
		}
		return false
	}
	n.hold(&n.own, h)
	return true
}

func (n *node) hold(where *held, h held) {
	n.y.mu.Lock()
	defer n.y.mu.Unlock()
	*where = h
}

// due says whether a certificate has to be replaced: half of its life is over,
// or the root of it signs no more.
func (n *node) due(h *held) bool {
	if h.leaf == nil || !time.Now().Before(halfLife(h)) {
		return true
	}
	return !slices.ContainsFunc(n.bundle.Roots, func(r ca.Root) bool { return r.ID == h.root && r.State == ca.Active })
}

func halfLife(h *held) time.Time {
	return h.leaf.NotBefore.Add(h.leaf.NotAfter.Sub(h.leaf.NotBefore) / 2)
}

// rest waits until there is something to do again.
func (n *node) rest(ctx context.Context) bool {
	next := halfLife(&n.work)
	if own := halfLife(&n.own); own.Before(next) {
		next = own
	}
	timer := time.NewTimer(time.Until(next))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-n.bundle.Replaced():
		select {
		case <-time.After(n.slow):
		case <-ctx.Done():
		}
		n.y.mu.Lock()
		n.bundle = n.y.authority.Bundle()
		n.y.mu.Unlock()
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

func (y *years) issue(ctx context.Context, req ca.X509Request) (held, bool) {
	svids, err := y.authority.IssueX509(ctx, audit.Origin{}, []ca.X509Request{req})
	if err == nil {
		err = svids[0].Err
	}
	var h held
	if err == nil {
		h, err = parseHeld(svids[0])
	}
	if err != nil {
		if ctx.Err() == nil {
			y.t.Errorf("%v: nothing is signed for %s: %v", time.Now(), req.ID, err)
		}
		return held{}, false
	}
	h.minted = req.Kind == ca.Minted
	y.mu.Lock()
	defer y.mu.Unlock()
	y.issued++
	return h, true
}

func parseHeld(svid ca.X509SVID) (held, error) {
	leaf, err := x509.ParseCertificate(svid.Chain[0])
	if err != nil {
		return held{}, err
	}
	issuer, err := x509.ParseCertificate(svid.Chain[1])
	return held{leaf: leaf, issuer: issuer, serial: svid.Serial, root: svid.AuthorityID}, err
}
