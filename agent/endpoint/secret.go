package endpoint

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"slices"
	"strings"
	"sync"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// SDSConfig is the agent's `sds` section: what Envoy gets on sds.sock. Besides
// the names below, a caller may ask for each of its own SPIFFE IDs, and for the
// bundle of a trust domain by the ID of that, as spiffe://example.org.
type SDSConfig struct {
	// Validation is how Envoy is told to check its peers. With spiffe, each trust
	// domain's roots are good for that domain alone (Envoy's SPIFFE validator).
	// With ca, the roots are a plain list (trusted_ca), for proxies without that
	// validator; then Envoy's own matchers have to look at the names. A proxy gets
	// plain lists too if its node metadata has disable_spiffe_cert_validation:
	// true. Default spiffe.
	Validation string `yaml:"validation"`
	// DefaultSVIDName is the name of the caller's first certificate. Default
	// default.
	DefaultSVIDName string `yaml:"default_svid_name"`
	// DefaultBundleName is the name of the own trust domain's roots. Default
	// ROOTCA.
	DefaultBundleName string `yaml:"default_bundle_name"`
	// DefaultAllBundlesName is the name of the roots of all trust domains that
	// are known. Default ALL.
	DefaultAllBundlesName string `yaml:"default_all_bundles_name"`
}

const (
	validationSPIFFE = "spiffe"
	validationCA     = "ca"
	spiffeScheme     = "spiffe://"
	// spiffeValidator is what Envoy calls it.
	spiffeValidator = "envoy.tls.cert_validator.spiffe"
)

// WithDefaults returns c with its zero fields filled.
func (c SDSConfig) WithDefaults() SDSConfig {
	for _, f := range []struct {
		field *string
		value string
	}{
		{&c.Validation, validationSPIFFE},
		{&c.DefaultSVIDName, "default"},
		{&c.DefaultBundleName, "ROOTCA"},
		{&c.DefaultAllBundlesName, "ALL"},
	} {
		if *f.field == "" {
			*f.field = f.value
		}
	}
	return c
}

// Check says whether the section makes sense.
func (c SDSConfig) Check() error {
	c = c.WithDefaults()
	if c.Validation != validationSPIFFE && c.Validation != validationCA {
		return badSDS("sds.validation is not known: set sds.validation: %s or %s", validationSPIFFE, validationCA)
	}
	taken := map[string]string{}
	for _, f := range []struct{ field, name string }{
		{"default_svid_name", c.DefaultSVIDName},
		{"default_bundle_name", c.DefaultBundleName},
		{"default_all_bundles_name", c.DefaultAllBundlesName},
	} {
		switch {
		case strings.HasPrefix(f.name, spiffeScheme):
			return badSDS("sds.%s is a SPIFFE ID, which names what has that ID: choose another name, or leave it out", f.field)
		case len(f.name) > maxName || strings.ContainsFunc(f.name, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
			return badSDS("sds.%s has to be of at most %d printable ASCII characters, without spaces", f.field, maxName)
		case taken[f.name] != "":
			return badSDS("sds.%s and sds.%s are the same name: change one of them", taken[f.name], f.field)
		}
		taken[f.name] = f.field
	}
	return nil
}

func badSDS(format string, args ...any) error {
	return fault.Newf(fault.Precondition, "config_sds", format, args...)
}

// secret is a resource of SDS, made once per snapshot for all who ask for it.
type secret struct {
	once     sync.Once
	resource *anypb.Any
	// digest tells its contents apart. It is of public parts alone: clients log
	// versions.
	digest [sha256.Size]byte
	err    error
}

// secretKey is what a snapshot's secrets are kept under. Only what is in a
// snapshot is: there are few of them.
type secretKey struct {
	name  string
	plain bool
}

// checkedKey is what the result of a snapshot's check is kept under.
type checkedKey struct{}

// errUnknown names a resource that the caller has no right to, or that does not
// exist: it learns no more than that.
func errUnknown(name string) error {
	return fault.Newf(fault.Invalid, "resource_unknown", "you have no secret %q here: ask for your own SPIFFE IDs and your trust domain's bundle", brief(name, 128))
}

// compose returns the response to who asked for names, without a nonce: of all
// names if there are none, bundles first, so that a client that takes one after
// the other trusts a new root before it has a certificate under it. missing is a
// name that the caller has nothing by.
func (c SDSConfig) compose(snap *cache.Snapshot, names []string, plain bool) (_ *discoveryv3.DiscoveryResponse, missing string, err error) {
	if err := checkOnce(snap); err != nil {
		return nil, "", err
	}
	if len(names) == 0 {
		names = c.everything(snap)
	}
	var bundles, svids []*secret
	for _, name := range names {
		svid, bundle := c.find(snap, name)
		if svid == nil && !bundle {
			return nil, name, errUnknown(name)
		}
		made := c.make(snap, name, svid, plain || c.Validation == validationCA)
		switch {
		case made.err != nil:
			return nil, "", errInvalid(made.err)
		case bundle:
			bundles = append(bundles, made)
		default:
			svids = append(svids, made)
		}
	}
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: secretType}
	version := sha256.New()
	for _, s := range slices.Concat(bundles, svids) {
		resp.Resources = append(resp.Resources, s.resource)
		_, _ = version.Write(s.digest[:])
	}
	resp.VersionInfo = hex.EncodeToString(version.Sum(nil)[:16])
	if size := proto.Size(resp); size > maxMessage {
		return nil, "", errTooLarge(size)
	}
	return resp, "", nil
}

// everything is the names of all that a caller may have.
func (c SDSConfig) everything(snap *cache.Snapshot) []string {
	names := []string{snap.TrustDomain.IDString()}
	for _, svid := range snap.SVIDs {
		if name := svid.ID.String(); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// find says what a snapshot has by a name: an SVID, the oldest if several have
// the ID, or the bundle. All bundles that are known is the own one.
func (c SDSConfig) find(snap *cache.Snapshot, name string) (svid *cache.SVID, bundle bool) {
	switch name {
	case c.DefaultSVIDName:
		return snap.SVIDs[0], false
	case c.DefaultBundleName, c.DefaultAllBundlesName, snap.TrustDomain.IDString():
		return nil, true
	}
	for _, svid := range snap.SVIDs {
		if svid.ID.String() == name {
			return svid, false
		}
	}
	return nil, false
}

// make returns the secret of a snapshot by a name that it has: an SVID, or the
// bundle if that is nil.
func (c SDSConfig) make(snap *cache.Snapshot, name string, svid *cache.SVID, plain bool) *secret {
	key := secretKey{name, plain && svid == nil}
	kept, ok := snap.Memo.Load(key)
	if !ok {
		kept, _ = snap.Memo.LoadOrStore(key, &secret{})
	}
	s := kept.(*secret)
	s.once.Do(func() {
		msg := &tlsv3.Secret{Name: name}
		var public []byte
		if svid != nil {
			public = svid.CertificatesDER
			msg.Type, s.err = tlsCertificate(svid)
		} else {
			public = snap.BundleDER
			msg.Type, s.err = validationContext(snap, key.plain)
		}
		if s.err == nil {
			s.resource, s.err = packed(msg)
		}
		h := sha256.New()
		_, _ = h.Write([]byte(name + "\x00"))
		if key.plain {
			_, _ = h.Write([]byte(validationCA))
		}
		_, _ = h.Write([]byte{0})
		_, _ = h.Write(public)
		h.Sum(s.digest[:0])
	})
	return s
}

// checkOnce is checkSnapshot, once per snapshot.
func checkOnce(snap *cache.Snapshot) error {
	kept, ok := snap.Memo.Load(checkedKey{})
	if !ok {
		kept, _ = snap.Memo.LoadOrStore(checkedKey{}, sync.OnceValue(func() error { return checkSnapshot(snap) }))
	}
	return kept.(func() error)()
}

// tlsCertificate is chain and key, always together: they can't come apart.
func tlsCertificate(svid *cache.SVID) (*tlsv3.Secret_TlsCertificate, error) {
	chain, err := certificatesPEM(svid.CertificatesDER)
	if err != nil {
		return nil, err
	}
	return &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(chain),
		PrivateKey:       inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: svid.Key.DER()})),
	}}, nil
}

func validationContext(snap *cache.Snapshot, plain bool) (*tlsv3.Secret_ValidationContext, error) {
	roots, err := certificatesPEM(snap.BundleDER)
	if err != nil {
		return nil, err
	}
	if plain {
		return &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(roots)}}, nil
	}
	config, err := packed(&tlsv3.SPIFFECertValidatorConfig{TrustDomains: []*tlsv3.SPIFFECertValidatorConfig_TrustDomain{
		{Name: snap.TrustDomain.Name(), TrustBundle: inline(roots)},
	}})
	if err != nil {
		return nil, err
	}
	return &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: config},
	}}, nil
}

func inline(data []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: data}}
}

// packed is an Any with the same bytes for the same message.
func packed(msg proto.Message) (*anypb.Any, error) {
	packed := &anypb.Any{}
	return packed, anypb.MarshalFrom(packed, msg, proto.MarshalOptions{Deterministic: true})
}

// certificatesPEM turns certificates that follow each other in DER into PEM.
func certificatesPEM(der []byte) ([]byte, error) {
	var out bytes.Buffer
	certs, err := x509.ParseCertificates(der)
	if err != nil {
		return nil, err
	}
	for _, cert := range certs {
		if err := pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}); err != nil {
			return nil, err
		}
	}
	if out.Len() == 0 {
		return nil, errors.New("no certificates")
	}
	return out.Bytes(), nil
}
