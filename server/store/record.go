package store

import (
	"bytes"
	"encoding/json"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Encode returns a record's value: the version of its schema in one byte, then
// v as JSON. Whoever adds a field to a record raises the version, so that an
// older program refuses the record instead of dropping the field.
func Encode(version byte, v any) ([]byte, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "record_not_encodable", "a record can't be encoded: report it")
	}
	return append([]byte{version}, text...), nil
}

// Decode reads a value that Encode made into v. A version above known is
// fault.Precondition with reason "store_newer"; everything that Encode can't
// have made of v's type is "store_corrupt". An owner that changed the meaning
// of a field between versions looks at data[0] first.
func Decode(data []byte, known byte, v any) error {
	if len(data) == 0 {
		return undecodable(nil)
	}
	if data[0] > known {
		return fault.Newf(fault.Precondition, "store_newer",
			"the store has records of version %d, this program knows up to %d: run the newer program", data[0], known)
	}
	text := data[1:]
	if bytes.Equal(bytes.TrimSpace(text), []byte("null")) {
		return undecodable(nil) // json would leave v as it is
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return undecodable(err)
	}
	if rest := text[dec.InputOffset():]; len(rest) > 0 {
		return undecodable(nil)
	}
	return nil
}

func undecodable(cause error) error {
	return fault.Wrap(fault.Precondition, cause, "store_corrupt",
		"a record of the store can't be read: stop the server and restore a backup into an empty data directory")
}
