package api

import (
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/registry"
)

// RemoteOperatorRule admits operators over the network: a valid certificate
// that has not ended since the handshake, for exactly one of the IDs.
func RemoteOperatorRule(ids []spiffeid.ID) rpc.Rule {
	return func(c rpc.Caller) error {
		switch {
		case c.State == rpc.CertNone:
			return fault.New(fault.Unauthenticated, "operator_svid_missing", "this method needs an operator's X.509-SVID, or the admin socket on the server's host")
		case c.State != rpc.CertValid || !time.Now().Before(c.NotAfter):
			return fault.New(fault.Unauthenticated, "operator_svid_expired", "the operator's X.509-SVID has expired: fetch the newest and connect again")
		case !slices.Contains(ids, c.ID):
			return fault.New(fault.Denied, "operator_not_allowed",
				"this SPIFFE ID may not operate the server: add it to admin.remote_spiffe_ids")
		}
		return nil
	}
}

// RemoteMethods is the method table of remote operators. It has the methods of
// the admin socket; those that only a local operator may call are refused.
func RemoteMethods(ids []spiffeid.ID, refused Refused) rpc.Methods {
	operator := RemoteOperatorRule(ids)
	local := func(c rpc.Caller) error {
		if err := operator(c); err != nil {
			return err
		}
		return fault.New(fault.Denied, "local_only", "this is done on the server's host only, through its admin socket")
	}
	return operatorMethods(reporting(operator, refused), reporting(local, refused))
}

// RemoteGuard keeps remote operators off the entries by which somebody becomes
// an operator: those for an operator's ID, and those about nodes, by which a
// node gets the entries of another parent. Of the latter there are two forms,
// below the server's own ID, and with an agent's ID as selector.
func RemoteGuard(ids []spiffeid.ID, server spiffeid.ID) registry.Guard {
	return func(e *registry.Entry) error {
		switch {
		case slices.Contains(ids, e.SPIFFEID):
			return fault.New(fault.Denied, "entry_local_only",
				"an entry for an operator's SPIFFE ID is made, changed and deleted on the server's host only, through its admin socket")
		case e.ParentID == server || slices.ContainsFunc(e.Selectors, func(s selector.Selector) bool { return s.Type == "spiffe_id" }):
			return fault.New(fault.Denied, "entry_local_only",
				"an entry about nodes (its parent is the server, or it has a selector spiffe_id) is made, changed and deleted on the server's host only, through its admin socket: it may give a node the entries of operators")
		}
		return nil
	}
}
