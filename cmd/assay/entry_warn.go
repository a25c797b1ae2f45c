package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strconv"
	"strings"

	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// The selectors that agents of this version make (docs/operating.md), by what
// stands before their second colon: of unix some hold a number, some a name, some
// tell of the program.
var (
	unixNumbers = []string{"uid", "gid", "supplementary_gid"}
	unixNames   = []string{"user", "group", "supplementary_group"}
	unixProgram = []string{"path", "sha256"}
	k8sFacts    = []string{
		"ns", "sa", "pod-name", "pod-uid", "pod-label", "pod-owner", "pod-owner-uid",
		"container-name", "container-image", "container-image-digest", "node-name", "cluster", "host",
	}
)

// warnOfEntry tells what keeps an entry that was just created from ever being
// matched. It is no error: a newer agent may know the selector, and the agent
// may join tomorrow.
func (t *tool) warnOfEntry(ctx context.Context, s *serverConn, e *types.Entry) {
	server, err := askServerID(ctx, s)
	if err != nil {
		return // it says nothing about the entry
	}
	if isAlias(e, server) {
		t.warnOfAlias(ctx, s, e)
		return
	}
	for _, sel := range e.GetSelectors() {
		if problem := selectorProblem(sel); problem != "" {
			t.warn(fault.New(fault.Invalid, "selector_unknown", quote(sel.GetType()+":"+sel.GetValue())+" "+problem))
		}
	}
	if !knownParent(ctx, s, server, e.GetParentId()) {
		t.warn(fault.New(fault.NotFound, "parent_unknown",
			idFromProto(e.GetParentId())+" is not an agent on record, nor an alias: nobody gets this identity until that agent joins; see assay agent list"))
	}
}

// warnOfEntries is warnOfEntry for many that were just made: each kind of
// trouble is told once, with the first that has it.
func (t *tool) warnOfEntries(ctx context.Context, s *serverConn, plan []planned, stored []*types.Entry) {
	var made []*types.Entry
	for i := range plan {
		if p := &plan[i]; p.err == nil && p.action() != "none" {
			made = append(made, p.want)
		}
	}
	if len(made) == 0 {
		return
	}
	server, err := askServerID(ctx, s)
	if err != nil {
		return
	}
	made = slices.DeleteFunc(made, func(e *types.Entry) bool { return isAlias(e, server) })
	t.warnOfSelectors(made)
	parents := map[string]bool{}
	for _, e := range made {
		parents[idFromProto(e.GetParentId())] = true
	}
	for _, e := range stored {
		if isAlias(e, server) {
			delete(parents, idFromProto(e.GetSpiffeId()))
		}
	}
	for i := range plan {
		if p := &plan[i]; p.err == nil && isAlias(p.want, server) {
			delete(parents, idFromProto(p.want.GetSpiffeId()))
		}
	}
	// Any failure says nothing about the entries.
	err = pages(func(token string) (string, error) {
		resp, err := ask(ctx, s, s.agents.ListAgents, &spireagent.ListAgentsRequest{OutputMask: &types.AgentMask{}, PageToken: token})
		for _, a := range resp.GetAgents() {
			delete(parents, idFromProto(a.GetId()))
		}
		return resp.GetNextPageToken(), err
	})
	for _, e := range made {
		if parent := idFromProto(e.GetParentId()); err == nil && parents[parent] {
			t.warn(fault.Newf(fault.NotFound, "parent_unknown",
				"%s is not an agent on record, nor an alias, nor are %d other parents: nobody gets their identities until those agents join; see assay agent list",
				parent, len(parents)-1))
			return
		}
	}
}

// warnOfSelectors tells each problem once.
func (t *tool) warnOfSelectors(list []*types.Entry) {
	told := map[string]bool{}
	for _, e := range list {
		for _, sel := range e.GetSelectors() {
			if problem := selectorProblem(sel); problem != "" && !told[problem] {
				told[problem] = true
				t.warn(fault.New(fault.Invalid, "selector_unknown", quote(sel.GetType()+":"+sel.GetValue())+" "+problem))
			}
		}
	}
}

// selectorProblem says why no process has this selector; nothing if one may.
func selectorProblem(sel *types.Selector) string {
	name, value, _ := strings.Cut(sel.GetValue(), ":")
	switch sel.GetType() {
	case "unix":
	case "k8s":
		if value == "" || !slices.Contains(k8sFacts, name) {
			return "matches no process: of type k8s there are " + strings.Join(k8sFacts, ", ") + ", each with a value"
		}
		return ""
	case spiffeIDType:
		return "matches no process: it names a node, and makes an alias as the only selector of an entry with that node as parent"
	default:
		return ""
	}
	switch {
	case slices.Contains(unixNumbers, name):
		if n, err := strconv.ParseUint(value, 10, 32); err != nil || strconv.FormatUint(n, 10) != value {
			return "matches no process: unix:" + name + " takes a plain number, as in unix:" + name + ":1000"
		}
	case slices.Contains(unixNames, name):
		if value == "" {
			return "matches no process: unix:" + name + " takes a name"
		}
	case name == "path":
		if !strings.HasPrefix(value, "/") {
			return "matches no process: unix:path takes an absolute path"
		}
	case name == "sha256":
		if sum, err := hex.DecodeString(value); err != nil || len(sum) != sha256.Size || strings.ToLower(value) != value {
			return "matches no process: unix:sha256 takes 64 digits of lower-case hex"
		}
	default:
		return "matches no process: of type unix there are " + strings.Join(slices.Concat(unixNumbers, unixNames, unixProgram), ", ")
	}
	return ""
}
