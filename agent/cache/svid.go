package cache

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SVID is an X.509-SVID with its key. It is not changed after it was made.
// Whoever prints, logs or encodes one gets its SPIFFE ID alone.
type SVID struct {
	EntryID string
	ID      spiffeid.ID
	Hint    string
	// CertificatesDER is the chain without the root, one after the other.
	CertificatesDER []byte
	Key             PrivateKey
	NotAfter        time.Time
	// AuthorityID is the root that the chain leads to.
	AuthorityID string

	renewAt time.Time
	life    time.Duration
}

// PrivateKey is a private key in PKCS#8. The zero value is none.
type PrivateKey struct {
	// A function: nothing that prints looks into one, not even for a wrong
	// verb, for which package fmt passes a type's own Format over.
	der func() []byte
}

// NewPrivateKey hides a key.
func NewPrivateKey(der []byte) PrivateKey { return PrivateKey{der: func() []byte { return der }} }

// DER returns the key, not to be changed, or nothing.
func (k PrivateKey) DER() []byte {
	if k.der == nil {
		return nil
	}
	return k.der()
}

// MarshalJSON refuses.
func (k PrivateKey) MarshalJSON() ([]byte, error) {
	return nil, errors.New("encode private key: it stays here")
}

// Format prints the SPIFFE ID for every verb.
func (s SVID) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(s.String())) }

// String returns the SPIFFE ID.
func (s SVID) String() string { return s.ID.String() }

// GoString returns the SPIFFE ID.
func (s SVID) GoString() string { return s.String() }

// MarshalJSON returns the SPIFFE ID.
func (s SVID) MarshalJSON() ([]byte, error) { return json.Marshal(s.String()) }

// LogValue returns the SPIFFE ID.
func (s SVID) LogValue() slog.Value { return slog.StringValue(s.String()) }
