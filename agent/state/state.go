package state

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// The files of the data directory.
const (
	identityName  = "identity.json"
	nextKeyName   = "next-key.json"
	bundleName    = "bundle.json"
	deliveredName = "delivered.json"

	// maxFile bounds what is read, and so what is written; the largest honest
	// file is a bundle.
	maxFile = 4 << 20
)

// State is the agent's memory on disk. Its methods may be called concurrently.
type State struct {
	dir    string
	td     spiffeid.TrustDomain
	unlock func() error

	mu        sync.Mutex
	identity  *Identity
	previous  *ecdsa.PrivateKey // of the identity before; see CacheKeys
	next      *ecdsa.PrivateKey
	bundle    *Bundle
	delivered []Delivered
}

// Open locks dir, which it makes if it is missing, and reads what is there.
// The directory belongs to one agent of one trust domain.
func Open(dir string, td spiffeid.TrustDomain) (*State, error) {
	if err := durable.MkdirPrivate(dir, 0o700); err != nil {
		return nil, err
	}
	if err := tighten(dir); err != nil {
		return nil, err
	}
	unlock, err := durable.LockDir(dir)
	if err != nil {
		return nil, err
	}
	s := &State{dir: dir, td: td, unlock: unlock}
	err = s.sweep()
	if err == nil {
		err = s.load()
	}
	if err != nil {
		_ = unlock()
		return nil, err
	}
	return s, nil
}

// sweep removes what was being written when the process was killed: there are
// keys in it.
func (s *State) sweep() error {
	for _, name := range []string{identityName, nextKeyName, bundleName, deliveredName} {
		if err := durable.Sweep(filepath.Join(s.dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// tighten takes group and others out of a directory of ours that a unit or a
// volume made wider. One that belongs to root stays as it is: the files in it
// are closed anyway.
func tighten(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	err = os.Chmod(dir, 0o700) //nolint:gosec // G302: it is a directory
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("restrict %s: %w", dir, err)
	}
	return nil
}

// Close gives the directory back.
func (s *State) Close() error { return s.unlock() }

// load reads all files. Errors of reading and of decoding name the file.
func (s *State) load() error {
	if data, err := s.read(identityName); err != nil || data != nil {
		if err == nil {
			s.identity, s.previous, err = decodeIdentity(data)
		}
		if err != nil {
			return s.corrupt(identityName, "remove it; the agent then attests anew, for which it needs a new join token", err)
		}
		if got := s.identity.AgentID.TrustDomain(); got != s.td {
			return s.foreign(identityName, got)
		}
	}
	if data, err := s.read(nextKeyName); err != nil || data != nil {
		if err == nil {
			s.next, err = decodeKeyFile(data)
		}
		if err != nil {
			return s.corrupt(nextKeyName, "remove it; the agent makes another key", err)
		}
	}
	// A crash between the two writes of SaveIdentity leaves the used key here.
	// A renewal with it would not renew the key.
	if s.next != nil && s.identity != nil && s.next.Equal(s.identity.Key) {
		s.next = nil
	}
	if data, err := s.read(bundleName); err != nil || data != nil {
		if err == nil {
			s.bundle, err = decodeBundle(data)
		}
		if err != nil {
			return s.corrupt(bundleName, "remove it; the agent then trusts what trust_bundle or pin says, so check that those are current", err)
		}
		if s.bundle.TrustDomain != s.td {
			return s.foreign(bundleName, s.bundle.TrustDomain)
		}
	}
	if data, err := s.read(deliveredName); err != nil || data != nil {
		if err == nil {
			s.delivered, err = decodeDelivered(data)
		}
		if err != nil {
			return s.corrupt(deliveredName, "remove it when no root rotation is going on; it tells how long SVIDs under older bundles live", err)
		}
	}
	return nil
}

// read returns a file's content, nil if there is no such file.
func (s *State) read(name string) ([]byte, error) {
	path := filepath.Join(s.dir, name)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	data, err := durable.ReadSecret(path, maxFile)
	if err == nil && len(data) == 0 {
		err = errors.New("the file is empty")
	}
	return data, err
}

// corrupt says which file is damaged and how to mend it. Errors that already
// say so, such as wrong owners, pass.
func (s *State) corrupt(name, mend string, err error) error {
	if _, ok := errors.AsType[*fault.Fault](err); ok {
		return err
	}
	return fault.Wrap(fault.Invalid, err, "state_corrupt",
		fmt.Sprintf("%s is damaged or was written by a newer version: %s", filepath.Join(s.dir, name), mend))
}

func (s *State) foreign(name string, td spiffeid.TrustDomain) error {
	return fault.Newf(fault.Precondition, "config_trust_domain",
		"%s belongs to trust domain %s, the configuration says %s: correct trust_domain, or give this agent another data_dir",
		filepath.Join(s.dir, name), td, s.td)
}

func (s *State) write(name string, data []byte) error {
	if len(data) > maxFile { // the next start would fail on it
		return fault.Newf(fault.Precondition, "state_too_large", "%s would have %d bytes, more than the %d that are read", name, len(data), maxFile)
	}
	return durable.WriteFile(filepath.Join(s.dir, name), data, 0o600)
}

func (s *State) remove(name string) error {
	err := os.Remove(filepath.Join(s.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return durable.SyncDir(s.dir)
}

// Identity returns who this agent is, false before it attested.
func (s *State) Identity() (Identity, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.identity == nil {
		return Identity{}, false
	}
	return *s.identity, true
}

// NextKey returns the key for the next CSR of the agent itself. The first call
// makes it durable; later ones return the same key until SaveIdentity took it.
func (s *State) NextKey() (*ecdsa.PrivateKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next != nil {
		return s.next, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	data, err := encodeKeyFile(key)
	if err != nil {
		return nil, err
	}
	if err := s.write(nextKeyName, data); err != nil {
		return nil, err
	}
	s.next = key
	return key, nil
}

// DropNextKey forgets the next key; NextKey makes another one.
func (s *State) DropNextKey() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = nil
	return s.remove(nextKeyName)
}

// PendingKey returns the next key if one was made: a CSR of it may have
// reached the server.
func (s *State) PendingKey() (*ecdsa.PrivateKey, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.next, s.next != nil
}

// SaveIdentity makes id the agent's identity, durably.
func (s *State) SaveIdentity(id Identity) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	previous := s.previous
	if s.identity != nil && !s.identity.Key.Equal(id.Key) {
		previous = s.identity.Key
	}
	data, err := encodeIdentity(&id, previous)
	if err != nil {
		return err
	}
	if err := s.write(identityName, data); err != nil {
		return err
	}
	s.identity, s.previous = &id, previous
	if s.next != nil && s.next.Equal(id.Key) {
		s.next = nil
		// What a failure leaves behind is recognised and dropped by load.
		_ = s.remove(nextKeyName)
	}
	return nil
}

// DropIdentity forgets who the agent is, with all its keys: it was banned.
func (s *State) DropIdentity() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.identity, s.previous, s.next = nil, nil, nil
	return errors.Join(s.remove(identityName), s.remove(nextKeyName))
}

// Bundle returns the newest bundle, false when there is none.
func (s *State) Bundle() (*Bundle, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bundle, s.bundle != nil
}

// SaveBundle makes b the current bundle, durably. Once the current one is
// authenticated, an unauthenticated one, a lower sequence, or other content
// under the same sequence is refused with reason bundle_rollback.
func (s *State) SaveBundle(b *Bundle) error {
	if err := b.check(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.TrustDomain != s.td {
		return fault.Newf(fault.Precondition, "bundle_invalid", "the bundle is of trust domain %s, not of %s", b.TrustDomain, s.td)
	}
	if old := s.bundle; old != nil {
		if err := old.mayBecome(b); err != nil {
			return err
		}
		if old.Authenticated == b.Authenticated && old.Equal(b) {
			return nil
		}
	}
	data, err := encodeBundle(b)
	if err != nil {
		return err
	}
	if err := s.write(bundleName, data); err != nil {
		return err
	}
	s.bundle = b
	return nil
}

// Delivered returns what SaveDelivered stored last.
func (s *State) Delivered() []Delivered {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.delivered)
}

// SaveDelivered stores until when SVIDs can live that were handed out.
func (s *State) SaveDelivered(list []Delivered) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	data, err := encodeDelivered(list)
	if err != nil {
		return err
	}
	if err := s.write(deliveredName, data); err != nil {
		return err
	}
	s.delivered = slices.Clone(list)
	return nil
}
