package main

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"os"
	"syscall"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/test/harness"
)

const nodeEntries = 10_000

// node measures an agent that comes up on a node with very many entries: when
// the first workload that waits has its SVID, and when the agent has all.
func (b *bench) node(s *harness.Site) {
	limit := time.Duration(float64(nodeEntries) / b.bothSidesLimit() * float64(time.Second))
	a := s.NewAgent("node")
	token := a.Join()
	b.admin(s).fillNode(a.ID)
	begin := time.Now()
	a.Launch(token)
	a.Eventually(20*time.Second, "socket", func() error { _, err := os.Stat(a.Socket()); return err })
	a.Eventually(20*time.Second, "SVID", b.workload(a.Endpoint()).fetch)
	first := time.Since(begin)
	a.Eventually(time.Minute, "all SVIDs", func() error {
		n, err := metric(a.Ops, "assay_agent_svids")
		if err == nil && n < nodeEntries {
			err = fmt.Errorf("%v of %d", n, nodeEntries)
		}
		return err
	})
	all := time.Since(begin)
	reissued := b.taint(s)
	a.Stop(syscall.SIGTERM)
	b.add(fmt.Sprintf("agent with %d entries: from exec to the first waiting workload", nodeEntries), ms(first), "", "", "<= 0.3 s")
	b.add("  all", fmt.Sprintf("%.2f s", all.Seconds()), fmt.Sprintf("%.2f s", limit.Seconds()),
		fmt.Sprintf("%.1fx", all.Seconds()/limit.Seconds()), "<= 1.5x")
	b.add(fmt.Sprintf("%d SVIDs re-issued after a taint", nodeEntries), fmt.Sprintf("%.2f s", reissued.Seconds()), fmt.Sprintf("%.2f s", limit.Seconds()),
		fmt.Sprintf("%.1fx", reissued.Seconds()/limit.Seconds()), "<= 1.5x")
}

// taint replaces the root and measures from the taint of the old one until the
// server has signed as many SVIDs as there were under it.
func (b *bench) taint(s *harness.Site) time.Duration {
	const signed = `assay_x509_svids_signed_total{kind="workload"}`
	s.CLI("root", "prepare", "--reason", "bench")
	// Those who fetched once and left hold the old bundle; nobody uses it here.
	s.CLI("root", "activate", "--force", "--yes", "--reason", "bench")
	before, err := metric(s.Ops, signed)
	b.must(err)
	begin := time.Now()
	s.CLI("root", "taint", "--yes")
	s.Server.Eventually(time.Minute, "all SVIDs again", func() error {
		n, err := metric(s.Ops, signed)
		if err == nil && n-before < nodeEntries {
			err = fmt.Errorf("%v of %d", n-before, nodeEntries)
		}
		return err
	})
	return time.Since(begin)
}

// fillNode gives an agent one entry for this user and all others for users
// that do not exist.
func (c *adminClient) fillNode(parent string) {
	const batch = 500
	for from := 0; from < nodeEntries; from += batch {
		req := &entryv1.BatchCreateEntryRequest{OutputMask: &types.EntryMask{}}
		for i := from; i < from+batch; i++ {
			uid := 1_000_000 + i
			if i == nodeEntries/2 {
				uid = os.Getuid()
			}
			req.Entries = append(req.Entries, &types.Entry{
				ParentId: protoID(c.b, parent), SpiffeId: protoID(c.b, fmt.Sprintf("spiffe://%s/node/%d", harness.TrustDomain, i)),
				Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", uid)}},
			})
		}
		resp, err := c.entries.BatchCreateEntry(context.Background(), req)
		c.b.must(err)
		for _, r := range resp.GetResults() {
			if r.GetStatus().GetCode() != 0 {
				c.b.Fatalf("create entry: %s", r.GetStatus().GetMessage())
			}
		}
	}
}

// bothSidesLimit is what a node and its server can do together at best with
// the standard library, on all cores: make a key and a CSR, verify the CSR and
// issue, read the certificate back; per second.
func (b *bench) bothSidesLimit() float64 {
	key := b.key()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	return b.onAllCores(func() error {
		req, err := x509.ParseCertificateRequest(b.csr(b.key()))
		if err == nil {
			err = req.CheckSignature()
		}
		var der []byte
		if err == nil {
			der, err = x509.CreateCertificate(rand.Reader, template, template, req.PublicKey, key)
		}
		if err == nil {
			_, err = x509.ParseCertificate(der)
		}
		return err
	})
}
