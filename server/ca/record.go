package ca

import (
	"bytes"
	"crypto/hmac"
	"encoding/json"
	"fmt"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// recordVersion is the newest schema of the records of this package.
const recordVersion = 1

// stamp authenticates the records of this package: a store that somebody else
// wrote to, or that rotted, must not pass for our own.
type stamp struct {
	mac func(name string, value []byte) []byte
}

// stamped is the stored form: a body and its MAC over key name, schema version
// and body.
type stamped struct {
	Body json.RawMessage `json:"body"`
	MAC  []byte          `json:"mac"`
}

// seal encodes body for the record under key.
func (s stamp) seal(key string, body any) ([]byte, error) {
	plain, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encode record %s: %w", key, err)
	}
	value, err := store.Encode(recordVersion, stamped{Body: plain, MAC: s.sum(key, plain)})
	if err != nil {
		return nil, fmt.Errorf("encode record %s: %w", key, err)
	}
	return value, nil
}

// open verifies the record under key and decodes its body.
func (s stamp) open(key string, value []byte, body any) error {
	var got stamped
	if err := store.Decode(value, recordVersion, &got); err != nil {
		return fmt.Errorf("decode record %s: %w", key, err)
	}
	if !hmac.Equal(got.MAC, s.sum(key, got.Body)) {
		return corrupt("record %s fails its check: somebody else wrote it, the disk changed it, or seal_key_file is not the one of this store", key)
	}
	// JSON has many spellings for one meaning. Only the one that was written
	// is accepted, so that no byte of a record is outside the check.
	canonical, err := store.Encode(recordVersion, got)
	if err != nil {
		return fmt.Errorf("encode record %s: %w", key, err)
	}
	if !bytes.Equal(canonical, value) {
		return corrupt("record %s is not in the form in which it was written", key)
	}
	if err := json.Unmarshal(got.Body, body); err != nil {
		return corrupt("record %s passes its check and can't be decoded", key)
	}
	return nil
}

func (s stamp) sum(key string, body []byte) []byte {
	return s.mac(key, append([]byte{recordVersion}, body...))
}

func corrupt(format string, args ...any) error {
	return fault.New(fault.Precondition, "store_corrupt",
		fmt.Sprintf(format, args...)+"; nothing was changed: restore a backup, or find out who writes to the store")
}
