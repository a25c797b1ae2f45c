package node

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

const (
	maxNodeCertificates = 64 << 10
	maxNodeKey          = 32 << 10
)

// X509Pop are the files by which a node proves itself with a certificate of
// another authority. Both are read anew at each attestation.
type X509Pop struct {
	CertificateFile string
	PrivateKeyFile  string
}

func (x X509Pop) isSet() bool { return x.CertificateFile != "" }

// nodeCertificate is what the node has from another authority.
type nodeCertificate struct {
	leaf  *x509.Certificate
	chain [][]byte // DER, the leaf first
	key   crypto.Signer
}

// read reads both files. That they can't be used is told with the file's name
// and nothing of its content.
func (x X509Pop) read() (*nodeCertificate, error) {
	unusable := func(path, why string) error {
		return fault.New(fault.Precondition, "node_certificate_unusable", path+" can't be used: "+why)
	}
	text, err := durable.ReadTrusted(x.CertificateFile, maxNodeCertificates)
	if err != nil {
		return nil, fmt.Errorf("read x509pop.certificate_file: %w", err)
	}
	chain, err := decodePEM(bytes.TrimSpace(text))
	if err != nil || len(chain) == 0 {
		return nil, unusable(x.CertificateFile, "put the node's certificate into it and its issuers behind that, in PEM, and nothing else")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, unusable(x.CertificateFile, "its first certificate is damaged")
	}
	secret, err := durable.ReadSecret(x.PrivateKeyFile, maxNodeKey)
	if err != nil {
		return nil, fmt.Errorf("read x509pop.private_key_file: %w", err)
	}
	defer clear(secret)
	key, err := parsePrivateKey(secret)
	if err != nil {
		return nil, unusable(x.PrivateKeyFile, err.Error())
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(leaf.PublicKey) {
		return nil, unusable(x.PrivateKeyFile, "it is not the key of the certificate in "+x.CertificateFile)
	}
	return &nodeCertificate{leaf: leaf, chain: chain, key: key}, nil
}

// parsePrivateKey reads the one private key of a PEM file. No cause is passed
// on: it might quote the key.
func parsePrivateKey(text []byte) (crypto.Signer, error) {
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("it holds no private key in PEM without a passphrase")
		}
		defer clear(block.Bytes)
		var key any
		var err error
		switch block.Type {
		case "EC PARAMETERS": // openssl puts it in front
			continue
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		default:
			return nil, errors.New("it holds no private key in PEM without a passphrase")
		}
		signer, ok := key.(crypto.Signer)
		if err != nil || !ok {
			return nil, errors.New("its private key is damaged, or of a kind that can't sign")
		}
		return signer, nil
	}
}

// joinByCertificate attests by the node's certificate.
func (n *Node) joinByCertificate(ctx context.Context) error {
	node, err := n.cfg.X509Pop.read()
	if err != nil {
		return err
	}
	err = n.attestBy(ctx, evidence{
		attestor: agentv1.AttestorX509Pop,
		payload: func(context.Context) ([]byte, error) {
			return proto.Marshal(&agentv1.X509PopPayload{Certificates: node.chain})
		},
		answer: node.answer,
	})
	if now := time.Now(); refused(err) && (now.After(node.leaf.NotAfter) || now.Before(node.leaf.NotBefore)) {
		return fault.Wrap(fault.Denied, err, "node_certificate_expired", fmt.Sprintf("the certificate in %s is valid from %s to %s: renew it",
			n.cfg.X509Pop.CertificateFile, node.leaf.NotBefore.UTC().Format(time.RFC3339), node.leaf.NotAfter.UTC().Format(time.RFC3339)))
	}
	return err
}

// answer signs what a challenge asks for: the connection, the nonce, the
// certificate and the key that is to be certified, all of them.
func (c *nodeCertificate) answer(state *tls.ConnectionState, key *ecdsa.PublicKey, challenge []byte) ([]byte, error) {
	var question agentv1.X509PopChallenge
	if err := proto.Unmarshal(challenge, &question); err != nil || len(question.GetNonce()) != agentv1.X509PopNonceLength {
		return nil, fault.New(fault.Precondition, "challenge_invalid", "the server's challenge is not one that this agent knows: upgrade the agent")
	}
	exported, err := state.ExportKeyingMaterial(agentv1.X509PopExporterLabel, question.GetNonce(), agentv1.X509PopExporterLength)
	if err != nil {
		return nil, fmt.Errorf("export keying material: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	signature, err := c.sign(agentv1.X509PopMessage(exported, c.leaf.Raw, spki))
	if err != nil {
		return nil, fmt.Errorf("sign with the node's key: %w", err)
	}
	return proto.Marshal(&agentv1.X509PopResponse{Signature: signature})
}

func (c *nodeCertificate) sign(message []byte) ([]byte, error) {
	hash := agentv1.X509PopHash(c.key.Public())
	digest := message
	if hash != 0 {
		h := hash.New()
		h.Write(message)
		digest = h.Sum(nil)
	}
	var opts crypto.SignerOpts = hash
	if _, ok := c.key.(*rsa.PrivateKey); ok {
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
	}
	return c.key.Sign(rand.Reader, digest, opts)
}
