package endpoint

import (
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// maxMessage is what gRPC clients accept by default, less something for the
// framing: a client that gets more fails with ResourceExhausted and asks again
// for ever (WL-36).
const maxMessage = 4<<20 - 1024

func errInvalid(cause error) error {
	return fault.Wrap(fault.NotReady, cause, "response_invalid",
		"the agent holds an incomplete answer and does not send it; its log has the cause")
}

func errTooLarge(size int) error {
	return fault.Newf(fault.NotReady, "response_too_large",
		"the answer has %d bytes and clients take %d: fewer entries must match this workload", size, maxMessage)
}

// checkSnapshot refuses to send what clients would discard, or misunderstand
// (WL-31): they drop a whole update for one fault in it, and in silence.
func checkSnapshot(snap *cache.Snapshot) error {
	if err := checkBundle(snap); err != nil {
		return errInvalid(err)
	}
	if len(snap.SVIDs) == 0 {
		return errInvalid(errors.New("no SVIDs")) // WL-28
	}
	hints := map[string]bool{}
	for _, svid := range snap.SVIDs {
		if err := checkSVID(snap, svid); err != nil {
			return errInvalid(fmt.Errorf("entry %s: %w", svid.EntryID, err))
		}
		if svid.Hint == "" {
			continue
		}
		if hints[svid.Hint] { // WL-33
			return errInvalid(fmt.Errorf("entry %s: hint %q is taken", svid.EntryID, svid.Hint))
		}
		hints[svid.Hint] = true
	}
	return nil
}

func checkBundle(snap *cache.Snapshot) error {
	if snap.TrustDomain.IsZero() {
		return errors.New("no trust domain")
	}
	roots, err := x509.ParseCertificates(snap.BundleDER) // WL-45
	if err != nil {
		return fmt.Errorf("parse bundle: %w", err)
	}
	if len(roots) == 0 {
		return errors.New("bundle without roots")
	}
	return nil
}

// checkSVID reads an SVID with the rules that workloads read it with: leaf
// first, CA intermediates, PKCS#8 key of the leaf (WL-41 to WL-44).
func checkSVID(snap *cache.Snapshot, svid *cache.SVID) error {
	parsed, err := x509svid.ParseRaw(svid.CertificatesDER, svid.Key.DER())
	if err != nil {
		return err
	}
	if parsed.ID != svid.ID {
		return fmt.Errorf("certificate is for %s, not for %s", parsed.ID, svid.ID)
	}
	if !svid.ID.MemberOf(snap.TrustDomain) {
		return fmt.Errorf("%s is not of trust domain %s", svid.ID, snap.TrustDomain.Name())
	}
	return nil
}
