package server

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/ca"
)

// NEG-26: when a root is revoked, connections whose peers chain to it end
// within seconds, and can't be made again; others go on.
func TestConnectionsEndWithTheirRoot(t *testing.T) {
	h := start(t)
	root := h.rooms.authority
	old := root.Issuer().AuthorityID
	order := ca.Order{Who: "a test", Operation: "op", Reason: "friday"}
	a := h.newAgent()
	leaving := openSync(t, a, nil)
	made, err := root.Prepare(t.Context(), order)
	if err != nil {
		t.Fatal(err)
	}
	if err := root.Activate(t.Context(), made.ID, order); err != nil {
		t.Fatal(err)
	}
	b := h.newAgent()
	staying := openSync(t, b, nil)
	one(t, staying)
	if err := root.Revoke(t.Context(), old, order); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := leaving.Recv(); err != nil {
				ended <- err
				return
			}
		}
	}()
	select {
	case err := <-ended:
		if status.Code(err) != codes.Unavailable {
			t.Errorf("the stream ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the stream goes on under a root that is revoked")
	}
	eventually(t, "the end of it as a caller", 5*time.Second, func() bool {
		_, err := a.SignX509(t.Context(), &agentv1.SignX509Request{})
		return err != nil
	})
	if _, err := b.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
		t.Errorf("an agent of the other root: %v", err)
	}
	id := h.operator().create(t, entry(b.id, "/b"))[0]
	for got := ""; got != id; {
		for _, msg := range next(t, staying) {
			for _, e := range msg.GetEntries() {
				got = e.GetId()
			}
		}
	}
}
