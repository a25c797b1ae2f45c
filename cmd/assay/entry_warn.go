package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"strconv"
	"strings"

	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// The unix selectors that agents of this version make (docs/operating.md), by
// what stands before their second colon: some hold a number, some a name, some
// tell of the program.
var (
	unixNumbers = []string{"uid", "gid", "supplementary_gid"}
	unixNames   = []string{"user", "group", "supplementary_group"}
	unixProgram = []string{"path", "sha256"}
)

// warnOfEntry tells what keeps an entry that was just created from ever being
// matched. It is no error: a newer agent may know the selector, and the agent
// may join tomorrow.
func (t *tool) warnOfEntry(ctx context.Context, s *serverConn, e *types.Entry) {
	for _, sel := range e.GetSelectors() {
		if problem := selectorProblem(sel); problem != "" {
			t.warn(fault.New(fault.Invalid, "selector_unknown", quote(sel.GetType()+":"+sel.GetValue())+" "+problem))
		}
	}
	// Any other failure says nothing about the entry.
	if _, err := ask(ctx, s, s.agents.GetAgent, &spireagent.GetAgentRequest{Id: e.GetParentId()}); errors.Is(err, fault.NotFound) {
		t.warn(fault.New(fault.NotFound, "parent_unknown",
			idFromProto(e.GetParentId())+" is not an agent on record: nobody gets this identity until that agent joins; see assay agent list"))
	}
}

// warnOfEntries is warnOfEntry for many that were just made: each kind of
// trouble is told once, with the first that has it.
func (t *tool) warnOfEntries(ctx context.Context, s *serverConn, plan []planned) {
	parents := map[string]bool{}
	var made []*planned
	told := map[string]bool{}
	for i := range plan {
		p := &plan[i]
		if p.err != nil || p.action() == "none" {
			continue
		}
		made = append(made, p)
		parents[idFromProto(p.want.GetParentId())] = true
		for _, sel := range p.want.GetSelectors() {
			text := sel.GetType() + ":" + sel.GetValue()
			if problem := selectorProblem(sel); problem != "" && !told[problem] {
				told[problem] = true
				t.warn(fault.New(fault.Invalid, "selector_unknown", quote(text)+" "+problem))
			}
		}
	}
	if len(made) == 0 {
		return
	}
	// Any failure says nothing about the entries.
	err := pages(func(token string) (string, error) {
		resp, err := ask(ctx, s, s.agents.ListAgents, &spireagent.ListAgentsRequest{OutputMask: &types.AgentMask{}, PageToken: token})
		for _, a := range resp.GetAgents() {
			delete(parents, idFromProto(a.GetId()))
		}
		return resp.GetNextPageToken(), err
	})
	for _, p := range made {
		if parent := idFromProto(p.want.GetParentId()); err == nil && parents[parent] {
			t.warn(fault.Newf(fault.NotFound, "parent_unknown",
				"%s is not an agent on record, nor are %d other parents: nobody gets their identities until those agents join; see assay agent list",
				parent, len(parents)-1))
			return
		}
	}
}

// selectorProblem says why no process has this selector; nothing if one may.
func selectorProblem(sel *types.Selector) string {
	if sel.GetType() != "unix" {
		return ""
	}
	name, value, _ := strings.Cut(sel.GetValue(), ":")
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
