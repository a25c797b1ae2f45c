package keys

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	sealKeyBytes = 32
	// maxSealKeyFile leaves room for line ends; the key is 44 characters.
	maxSealKeyFile = 256

	// Each use of the seal key has a key of its own, derived under its label.
	labelWrap = "assay seal key v1: wrap authority keys"
	labelMAC  = "assay seal key v1: authenticate records"

	redacted = "[redacted]"
)

// SealKey is the secret under which authority keys are encrypted and records
// are authenticated. The zero value holds no key; the functions of this
// package refuse it.
type SealKey struct {
	// A function: nothing that prints looks into one. A SealKey in another
	// struct's unexported field is out of reach of its own formatters, and
	// package fmt follows pointers there when a verb does not fit.
	secret func() secret
}

type secret struct {
	wrap, mac []byte
}

// NewSealKey returns a fresh random seal key that is stored nowhere: what is
// sealed under it ends with the process. For development and tests.
func NewSealKey() (SealKey, error) {
	raw := make([]byte, sealKeyBytes)
	if _, err := rand.Read(raw); err != nil {
		return SealKey{}, fmt.Errorf("read random bytes: %w", err)
	}
	return derive(raw)
}

// LoadSealKey reads the seal key from a file: 32 bytes in base64. Faults are
// seal_key_missing, seal_key_invalid and path_untrusted.
func LoadSealKey(path string) (SealKey, error) {
	text, err := durable.ReadSecret(path, maxSealKeyFile)
	switch {
	case fault.ReasonOf(err) == "path_missing":
		return SealKey{}, fault.Wrap(fault.Precondition, err, "seal_key_missing",
			"there is no seal key at "+path+": put the one of this store there, or make one for a new store with `assay-server seal-key "+path+"`")
	case fault.ReasonOf(err) == "file_too_large":
		return SealKey{}, notASealKey(path)
	case err != nil:
		return SealKey{}, fmt.Errorf("read seal key: %w", err)
	}
	defer clear(text)
	raw := make([]byte, base64.StdEncoding.DecodedLen(len(text)))
	defer clear(raw)
	n, err := base64.StdEncoding.Strict().Decode(raw, bytes.TrimSpace(text))
	if err != nil || n != sealKeyBytes {
		// The decoder's error would quote from the file: it is left out.
		return SealKey{}, notASealKey(path)
	}
	return derive(raw[:n])
}

func notASealKey(path string) error {
	return fault.New(fault.Precondition, "seal_key_invalid",
		path+" does not hold 32 bytes in base64: it is not a seal key, or was damaged")
}

// WriteSealKey makes a new seal key and writes it to path with mode 0600. It
// never replaces a file: a seal key that is lost takes its store with it.
func WriteSealKey(path string) (err error) {
	if err := durable.CheckWritable(path); err != nil {
		return err
	}
	raw := make([]byte, sealKeyBytes)
	defer clear(raw)
	if _, err := rand.Read(raw); err != nil {
		return fmt.Errorf("read random bytes: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fault.Wrap(fault.Exists, err, "seal_key_exists",
			path+" exists already: a seal key is never overwritten, name another file")
	}
	if err != nil {
		return fmt.Errorf("create seal key: %w", err)
	}
	// Half a key is worse than none: what can't be finished is taken back.
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	text := append(base64.StdEncoding.AppendEncode(nil, raw), '\n')
	defer clear(text)
	_, werr := f.Write(text)
	if err := errors.Join(werr, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write seal key: %w", err)
	}
	return durable.SyncDir(filepath.Dir(path))
}

func derive(raw []byte) (SealKey, error) {
	wrap, err := hkdf.Key(sha256.New, raw, nil, labelWrap, 32)
	if err != nil {
		return SealKey{}, fmt.Errorf("derive wrapping key: %w", err)
	}
	mac, err := hkdf.Key(sha256.New, raw, nil, labelMAC, 32)
	if err != nil {
		return SealKey{}, fmt.Errorf("derive record key: %w", err)
	}
	hidden := secret{wrap: wrap, mac: mac}
	return SealKey{secret: func() secret { return hidden }}, nil
}

// MAC authenticates a record: HMAC-SHA256 over the length of its name, the
// name and the value. It panics on the zero SealKey: a MAC under no key must
// not exist.
func (k SealKey) MAC(name string, value []byte) []byte {
	if k.secret == nil {
		panic("keys: MAC with a SealKey that holds no key")
	}
	h := hmac.New(sha256.New, k.secret().mac)
	var length [8]byte
	binary.BigEndian.PutUint64(length[:], uint64(len(name)))
	h.Write(length[:])
	h.Write([]byte(name))
	h.Write(value)
	return h.Sum(nil)
}

// Format prints a constant text for every verb.
func (k SealKey) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// String returns a constant text.
func (k SealKey) String() string { return redacted }

// GoString returns a constant text.
func (k SealKey) GoString() string { return redacted }

// MarshalText returns a constant text; it also serves JSON and YAML.
func (k SealKey) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalJSON returns a constant text.
func (k SealKey) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// LogValue returns a constant text.
func (k SealKey) LogValue() slog.Value { return slog.StringValue(redacted) }
