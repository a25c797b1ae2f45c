package attest

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// errAmbiguous is of a payload that can be read in more than one way.
var errAmbiguous = errors.New("a field is there twice or is not known")

// decode reads a payload that says each thing once. Protobuf itself takes a
// field twice and lets the last one win, and skips what it doesn't know: two
// readers of such bytes could disagree on what was proved, so there is one
// reading or none (NEG-17). Payloads are flat: no message is in another.
func decode(payload []byte, into proto.Message) error {
	fields := into.ProtoReflect().Descriptor().Fields()
	seen := map[protowire.Number]bool{}
	for rest := payload; len(rest) > 0; {
		number, _, n := protowire.ConsumeField(rest)
		if n < 0 {
			return fmt.Errorf("read payload: %w", protowire.ParseError(n))
		}
		field := fields.ByNumber(number)
		if field == nil || seen[number] && !field.IsList() {
			return fmt.Errorf("read payload: %w", errAmbiguous)
		}
		seen[number] = true
		rest = rest[n:]
	}
	if err := proto.Unmarshal(payload, into); err != nil {
		return fmt.Errorf("read payload: %w", err)
	}
	// A known number with another wire type counts as unknown too.
	if len(into.ProtoReflect().GetUnknown()) > 0 {
		return fmt.Errorf("read payload: %w", errAmbiguous)
	}
	return nil
}
