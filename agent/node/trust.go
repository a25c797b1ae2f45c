package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// maxTrustBundle bounds the trust bundle file.
const maxTrustBundle = 1 << 20

// CheckPin says whether pin can be the SHA-256 of a root's public key.
func CheckPin(pin string) error {
	if raw, err := hex.DecodeString(pin); err != nil || len(raw) != sha256.Size {
		return fault.New(fault.Precondition, "config_pin",
			"pin is the SHA-256 of a root's public key, 64 hex digits; `assay token create` prints it")
	}
	return nil
}

// readTrustBundle reads the roots in a trust bundle file. Not being able to is
// a fault of the configuration, so it ends the start.
func readTrustBundle(path string, td spiffeid.TrustDomain) (*state.Bundle, error) {
	if err := durable.CheckReadable(path); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open trust bundle: %w", err)
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxTrustBundle+1))
	if err != nil {
		return nil, fmt.Errorf("read trust bundle: %w", err)
	}
	if len(data) > maxTrustBundle {
		err = errors.New("it is larger than 1 MiB")
	}
	var b *state.Bundle
	if err == nil {
		b, err = parseTrustBundle(data, td)
	}
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "config_trust_bundle",
			path+" holds no usable trust bundle (PEM certificates or SPIFFE JSON): get the current one with `assay bundle show`")
	}
	return b, nil
}

// parseTrustBundle decodes PEM certificates or a SPIFFE bundle in JSON.
func parseTrustBundle(data []byte, td spiffeid.TrustDomain) (*state.Bundle, error) {
	var ders [][]byte
	var sequence uint64
	var err error
	if text := bytes.TrimSpace(data); bytes.HasPrefix(text, []byte("{")) {
		ders, sequence, err = decodeJWKS(text)
	} else {
		ders, err = decodePEM(text)
	}
	if err != nil {
		return nil, err
	}
	var roots []state.Authority
	seen := map[string]bool{}
	for _, der := range ders {
		root, err := state.ParseAuthority("", der)
		if err != nil {
			return nil, err
		}
		if !seen[root.ID] {
			seen[root.ID] = true
			roots = append(roots, root)
		}
	}
	return state.NewBundle(td, sequence, false, roots)
}

func decodePEM(data []byte) ([][]byte, error) {
	var ders [][]byte
	for len(data) > 0 {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("decode PEM: no block, or text between blocks")
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("decode PEM: a block of type %q, want CERTIFICATE", block.Type)
		}
		ders = append(ders, block.Bytes)
		data = bytes.TrimSpace(rest)
	}
	return ders, nil
}

// decodeJWKS returns the X.509 roots of a SPIFFE bundle. An element that is
// not for X.509-SVIDs, or that we can't know, is ignored and the others count
// (SPIFFE Trust Domain and Bundle sections 4.2.1, 4.2.2; X509-SVID section
// 6.2). Names are compared as written, which encoding/json alone does not do.
func decodeJWKS(data []byte) (ders [][]byte, sequence uint64, err error) {
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, 0, fmt.Errorf("decode JSON: %w", err)
	}
	if raw, ok := doc["spiffe_sequence"]; ok {
		if sequence, err = strconv.ParseUint(string(raw), 10, 64); err != nil {
			return nil, 0, errors.New("decode JSON: spiffe_sequence is no integer of 64 bits")
		}
	}
	var elements []json.RawMessage
	if err := json.Unmarshal(doc["keys"], &elements); err != nil || elements == nil {
		return nil, 0, errors.New("decode JSON: keys must be an array")
	}
	for _, raw := range elements {
		der, err := decodeJWK(raw)
		if err != nil {
			return nil, 0, err
		}
		if der != nil {
			ders = append(ders, der)
		}
	}
	return ders, sequence, nil
}

// decodeJWK returns the certificate of one element, nil for one to ignore.
func decodeJWK(raw json.RawMessage) ([]byte, error) {
	var members map[string]json.RawMessage
	if json.Unmarshal(raw, &members) != nil {
		return nil, nil
	}
	text := func(name string) string {
		var s string
		if json.Unmarshal(members[name], &s) != nil {
			return ""
		}
		return s
	}
	if kty := text("kty"); kty != "EC" && kty != "RSA" {
		return nil, nil
	}
	if text("use") != "x509-svid" {
		return nil, nil
	}
	var x5c []string
	if json.Unmarshal(members["x5c"], &x5c) != nil || len(x5c) == 0 {
		return nil, nil
	}
	der, err := base64.StdEncoding.DecodeString(x5c[0])
	if err != nil {
		return nil, fmt.Errorf("decode x5c: %w", err)
	}
	return der, nil
}

// establishTrust returns when there is a bundle by which the server can be
// recognised.
func (n *Node) establishTrust(ctx context.Context) error {
	if b, ok := n.state.Bundle(); ok && b.Authenticated {
		return nil
	}
	if n.cfg.TrustBundle != "" {
		b, err := readTrustBundle(n.cfg.TrustBundle, n.cfg.TrustDomain)
		n.bootstrap.Store(b)
		return err
	}
	return n.retry(ctx, "fetch the root that the pin names", "pin", func(ctx context.Context) error {
		b, err := n.fetchPinned(ctx)
		n.bootstrap.Store(b)
		return err
	})
}

// fetchPinned asks a server that is not verified for its bundle and keeps the
// one root that the pin names. All that a false server can do is to fail.
func (n *Node) fetchPinned(ctx context.Context) (*state.Bundle, error) {
	cc, err := n.dial(rpc.ClientTLSUnverified())
	if err != nil {
		return nil, err
	}
	defer func() { _ = cc.Close() }()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := agentv1.NewAgentClient(cc).Bundle(ctx, &agentv1.BundleRequest{}, grpc.WaitForReady(false))
	if err != nil {
		return nil, cc.withoutBundle(err)
	}
	for _, a := range resp.GetBundle().GetX509Authorities() {
		root, err := state.ParseAuthority("", a.GetCertificate())
		if err != nil {
			continue
		}
		sum := sha256.Sum256(root.Certificate.RawSubjectPublicKeyInfo)
		if hex.EncodeToString(sum[:]) == strings.ToLower(n.cfg.Pin) {
			return state.NewBundle(n.cfg.TrustDomain, 0, false, []state.Authority{root})
		}
	}
	return nil, fault.New(fault.Denied, "pin_mismatch",
		"none of the server's roots has the key that pin names: this is another server, or the pin is of a root that was rotated away")
}

// withoutBundle says why a server that is not verified gave no bundle. Of its
// own word only the gRPC code is left: a reason from it, such as a ban, would be
// acted upon.
func (l *link) withoutBundle(err error) error {
	if _, trouble := l.trouble(); trouble != nil {
		return trouble
	}
	return fault.Newf(fault.NotReady, "bundle_unavailable", "the server at %s gave no bundle (%s)",
		strings.Join(l.node.cfg.Addresses, " or at "), status.Code(err))
}

// bundle returns what to verify the server with.
func (n *Node) bundle() *state.Bundle {
	if b, ok := n.state.Bundle(); ok && b.Authenticated {
		return b
	}
	return n.bootstrap.Load()
}
