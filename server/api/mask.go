package api

import (
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// applyMask clears the fields of m that mask does not name. A nil mask keeps
// all. Fields that the mask's type doesn't have, such as an entry's id, are
// always kept: that is how SPIRE's masks are defined.
func applyMask(m, mask proto.Message) {
	to, names := m.ProtoReflect(), mask.ProtoReflect()
	if !names.IsValid() {
		return
	}
	known := names.Descriptor().Fields()
	to.Range(func(field protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if sel := known.ByName(field.Name()); sel != nil && !names.Get(sel).Bool() {
			to.Clear(field)
		}
		return true
	})
}

func maskEntry(e *types.Entry, mask *types.EntryMask) *types.Entry {
	applyMask(e, mask)
	return e
}

func maskAgent(a *types.Agent, mask *types.AgentMask) *types.Agent {
	applyMask(a, mask)
	return a
}

func maskBundle(b *types.Bundle, mask *types.BundleMask) *types.Bundle {
	applyMask(b, mask)
	return b
}
