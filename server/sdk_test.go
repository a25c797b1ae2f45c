package server

import (
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// The tests in sdk_*_test.go hold the operators' API to the comments of its
// .proto files, through the SDK's own clients. What is expected is worked out
// from those comments, here, and not from what the server does.

// pagesOf reads all pages of a list and returns the keys in their order. No
// page may be larger than what was asked for, or empty with more to come, and
// nothing may follow the last item but the end.
func pagesOf(t *testing.T, what string, size int32, next func(token string) (keys []string, following string)) []string {
	t.Helper()
	all, token := []string{}, ""
	for {
		keys, following := next(token)
		if size > 0 && len(keys) > int(size) {
			t.Fatalf("%s: a page of %d has %d items", what, size, len(keys))
		}
		if len(keys) == 0 && (token != "" || following != "") {
			t.Fatalf("%s: an empty page beside others", what)
		}
		if all = append(all, keys...); following == "" {
			break
		}
		token = following
	}
	if !slices.IsSorted(all) || len(slices.Compact(slices.Clone(all))) != len(all) {
		t.Errorf("%s: pages are not in order or have something twice: %v", what, all)
	}
	return all
}

// checkMasks asks with each mask of one field, of none, of all, and with none
// at all. full is the answer that a mask is applied to: fields that it can
// name come if it names them, all others always.
func checkMasks(t *testing.T, what string, full, mask proto.Message, ask func(mask proto.Message) proto.Message) {
	t.Helper()
	names := mask.ProtoReflect().Descriptor().Fields()
	check := func(name string, mask proto.Message, named func(protoreflect.Name) bool) {
		t.Helper()
		want := proto.Clone(full)
		want.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
			if names.ByName(f.Name()) != nil && !named(f.Name()) {
				want.ProtoReflect().Clear(f)
			}
			return true
		})
		if got := ask(mask); !proto.Equal(got, want) {
			t.Errorf("%s with mask %s:\ngot  %v\nwant %v", what, name, got, want)
		}
	}
	every := mask.ProtoReflect().New()
	for i := range names.Len() {
		one := mask.ProtoReflect().New()
		one.Set(names.Get(i), protoreflect.ValueOfBool(true))
		every.Set(names.Get(i), protoreflect.ValueOfBool(true))
		check(string(names.Get(i).Name()), one.Interface(), func(n protoreflect.Name) bool { return n == names.Get(i).Name() })
	}
	check("of all", every.Interface(), func(protoreflect.Name) bool { return true })
	check("of none", mask.ProtoReflect().New().Interface(), func(protoreflect.Name) bool { return false })
	check("missing", mask.ProtoReflect().Type().Zero().Interface(), func(protoreflect.Name) bool { return true })
}
