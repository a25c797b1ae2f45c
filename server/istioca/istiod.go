package istioca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/kube"
)

// ruleIstiod is the rule of istiod's own certificate, in the audit log.
const ruleIstiod = "istio_istiod"

const (
	// istiodAgain is how often a Secret is looked at: somebody may have changed or
	// deleted it.
	istiodAgain = 5 * time.Second
	// istiodTold is how often the same trouble is logged.
	istiodTold = time.Minute
	// A change that is taken back so soon, so many times in a row, is somebody
	// else's Secret too: then it is written no more than once in a while.
	istiodUndone      = 30 * time.Second
	istiodUndoneTimes = 5
)

// RootConfigMaps are the clusters in which each namespace has the trust bundle.
func (c Config) RootConfigMaps() (names []string) {
	for _, name := range slices.Sorted(maps.Keys(c.Clusters)) {
		if c.Clusters[name].RootConfigMaps {
			names = append(names, name)
		}
	}
	return names
}

// withIstiodNames returns c with the names by which istiod is called.
func (c ClusterConfig) withIstiodNames() ClusterConfig {
	namespace, _, ok := strings.Cut(c.IstiodSecret, "/")
	if ok && len(c.IstiodDNSNames) == 0 {
		for _, service := range []string{"istiod", "istiod-remote", "istio-pilot"} {
			c.IstiodDNSNames = append(c.IstiodDNSNames, service+"."+namespace+".svc")
		}
	}
	return c
}

// checkKept says what is wrong with what is to be kept in a cluster.
func (c ClusterConfig) checkKept(key string, watched bool) error {
	switch {
	case c.RootConfigMaps && !watched:
		return bad("%s.root_config_maps is for a cluster of kubernetes.clusters: add it there, or leave root_config_maps out", key)
	case c.IstiodSecret != "" && !watched:
		return bad("%s.istiod_secret is for a cluster of kubernetes.clusters: add it there, or leave istiod_secret out", key)
	case c.IstiodSecret != "" && !accountName.MatchString(c.IstiodSecret):
		return bad("%s.istiod_secret is not namespace/name: write it as istio-system/istiod-tls", key)
	case c.IstiodSecret == "" && len(c.IstiodDNSNames) > 0:
		return bad("%s.istiod_dns_names is for istiod_secret, which is not set: set %s.istiod_secret: istio-system/istiod-tls", key, key)
	}
	if err := name.CheckDNS(c.IstiodDNSNames); err != nil {
		return bad("%s.istiod_dns_names: %s", key, fault.SafeText(err))
	}
	return nil
}

// Signer is an Authority that says by which root it signs; *ca.Authority does.
type Signer interface {
	Authority
	Issuer() ca.IssuerInfo
}

// Secrets are where istiod finds its certificate; *kube.Clusters keep them.
type Secrets interface {
	TLSSecret(ctx context.Context, cluster, namespace, name string) (kube.TLSSecret, error)
	PutTLSSecret(ctx context.Context, cluster, namespace, name string, was, will kube.TLSSecret) error
}

// IstiodOptions is what Istiods are made of; all fields are needed.
type IstiodOptions struct {
	TrustDomain spiffeid.TrustDomain
	Config      Config      // with defaults, checked
	Server      spiffeid.ID // ours
	Authority   Signer
	Secrets     Secrets
	Log         *slog.Logger
	Registerer  prometheus.Registerer
}

// Istiods keep the certificates of a mesh's control planes, which nobody else
// gives them when istiod is no CA: each in a Secret of its cluster.
type Istiods struct{ all []*istiod }

// istiod is one of them.
type istiod struct {
	cluster, namespace, secret string

	id        spiffeid.ID
	dns       []string
	server    spiffeid.ID
	authority Signer
	secrets   Secrets
	log       *slog.Logger
	notAfter  prometheus.Gauge

	due    time.Time // when the certificate with serial is to be renewed
	serial string
	told   time.Time // when trouble was last logged; zero: there is none
	// made is what could not be put there yet; put is when the last one was, and
	// undone how many in a row were taken back soon.
	made   kube.TLSSecret
	put    time.Time
	undone int
}

// NewIstiods returns those of a configuration, which may be none.
func NewIstiods(o IstiodOptions) (*Istiods, error) {
	ends := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "assay_istio_istiod_certificate_not_after_timestamp_seconds",
		Help: "When the certificate in istiod's Secret ends, in Unix time; 0 while none could be put there, and while there is no Secret. No series without istiod_secret.",
	}, []string{"cluster"})
	if err := o.Registerer.Register(ends); err != nil {
		return nil, err
	}
	i := &Istiods{}
	for _, cluster := range slices.Sorted(maps.Keys(o.Config.Clusters)) {
		cfg := o.Config.Clusters[cluster]
		namespace, secret, ok := strings.Cut(cfg.IstiodSecret, "/")
		if !ok {
			continue
		}
		id, err := spiffeid.FromSegments(o.TrustDomain, "ns", namespace, "sa", "istiod")
		if err != nil {
			return nil, fmt.Errorf("build istiod's ID: %w", err)
		}
		i.all = append(i.all, &istiod{
			cluster: cluster, namespace: namespace, secret: secret, id: id, dns: cfg.IstiodDNSNames, server: o.Server,
			authority: o.Authority, secrets: o.Secrets, notAfter: ends.WithLabelValues(cluster),
			log: o.Log.With(slog.String("cluster", cluster), slog.String("secret", cfg.IstiodSecret)),
		})
	}
	return i, nil
}

// Run keeps them until ctx ends.
func (i *Istiods) Run(ctx context.Context) error {
	var all sync.WaitGroup
	for _, one := range i.all {
		all.Go(func() { one.run(ctx) })
	}
	all.Wait()
	return nil
}

func (i *istiod) run(ctx context.Context) {
	wait := schedule.Backoff{Min: time.Second, Max: time.Minute}
	for {
		bundle, pause := i.authority.Bundle(), istiodAgain
		err := i.keep(ctx, bundle)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			if fault.ReasonOf(err) != "kubernetes_secret_missing" { // else somebody makes it, and waits
				pause = wait.Next()
			}
			i.tell(ctx, err)
		} else {
			wait.Reset()
			i.told = time.Time{}
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-bundle.Replaced():
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (i *istiod) tell(ctx context.Context, err error) {
	if !i.told.IsZero() && time.Since(i.told) < istiodTold {
		return
	}
	i.told = time.Now()
	i.log.LogAttrs(ctx, slog.LevelWarn, "istiod's certificate can't be kept: when it ends, no proxy reaches istiod", slog.String("error", err.Error()))
}

// keep looks at the Secret once, and puts another certificate into it if there is
// a reason to.
func (i *istiod) keep(ctx context.Context, bundle *ca.Bundle) error {
	was, err := i.secrets.TLSSecret(ctx, i.cluster, i.namespace, i.secret)
	if fault.ReasonOf(err) == "kubernetes_secret_missing" {
		i.notAfter.Set(0) // what it had is gone with it
	}
	if err != nil {
		return err
	}
	leaf, why := i.look(was, bundle, i.authority.Issuer().AuthorityID, time.Now())
	if why == "" {
		i.notAfter.Set(float64(leaf.NotAfter.Unix()))
		if time.Since(i.put) > istiodUndone {
			i.undone = 0 // it has stayed
		}
		return nil
	}
	if err := i.contested(time.Now()); err != nil {
		return err
	}
	// One that could not be put there is as good the next time.
	leaf, no := i.look(i.made, bundle, i.authority.Issuer().AuthorityID, time.Now())
	if no != "" {
		if i.made, leaf, err = i.issue(ctx, bundle); err != nil {
			return err
		}
	}
	if err := i.secrets.PutTLSSecret(ctx, i.cluster, i.namespace, i.secret, was, i.made); err != nil {
		return err
	}
	i.made, i.put = kube.TLSSecret{}, time.Now()
	i.notAfter.Set(float64(leaf.NotAfter.Unix()))
	i.log.LogAttrs(ctx, slog.LevelInfo, "istiod has another certificate", slog.String("why", why),
		slog.String("serial", leaf.SerialNumber.Text(16)), slog.Time("not_after", leaf.NotAfter))
	return nil
}

// contested counts changes that were taken back, and says when that is enough.
func (i *istiod) contested(now time.Time) error {
	if i.put.IsZero() || now.Sub(i.put) > istiodUndone {
		return nil
	}
	if i.undone < istiodUndoneTimes {
		i.undone++
		return nil
	}
	return fault.New(fault.Conflict, "kubernetes_contested",
		"somebody else keeps changing the Secret "+i.namespace+"/"+i.secret+": have it kept by one alone, and take it from cert-manager or istio-csr")
}

// look says why a Secret needs another certificate; "" if it does not.
func (i *istiod) look(held kube.TLSSecret, bundle *ca.Bundle, signs string, now time.Time) (leaf *x509.Certificate, why string) {
	if len(held.Chain)+len(held.Key)+len(held.Roots) == 0 {
		return nil, "there is none"
	}
	pair, err := tls.X509KeyPair(held.Chain, held.Key) // the key is the certificate's
	if err != nil || len(pair.Certificate) != 2 {
		return nil, "it is no certificate of ours"
	}
	issuer, err := x509.ParseCertificate(pair.Certificate[1])
	if err != nil {
		return nil, "it is no certificate of ours"
	}
	leaf = pair.Leaf
	root := slices.IndexFunc(bundle.Roots, func(r ca.Root) bool { return issuer.CheckSignatureFrom(r.Certificate) == nil })
	switch {
	case root < 0 || leaf.CheckSignatureFrom(issuer) != nil:
		return nil, "it is no certificate of ours"
	case len(leaf.URIs) != 1 || leaf.URIs[0].String() != i.id.String() || !slices.Equal(leaf.DNSNames, i.dns):
		return nil, "it has other names"
	case !bytes.Equal(held.Roots, bundle.PEM()):
		return nil, "the trust bundle is another"
	case signs != "" && bundle.Roots[root].ID != signs:
		return nil, "another root signs"
	}
	if serial := leaf.SerialNumber.String(); serial != i.serial {
		i.serial, i.due = serial, schedule.RenewAt(leaf.NotBefore, leaf.NotAfter)
	}
	if !now.Before(i.due) {
		return nil, "half of its life is over"
	}
	return leaf, ""
}

// issue makes a key and has our own authority sign for it: there is no other road
// to a signature.
func (i *istiod) issue(ctx context.Context, bundle *ca.Bundle) (kube.TLSSecret, *x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return kube.TLSSecret{}, nil, fmt.Errorf("generate istiod's key: %w", err)
	}
	by := audit.Origin{Actor: audit.Actor{Kind: "server", SPIFFEID: i.server.String()}}
	svids, err := i.authority.IssueX509(ctx, by, []ca.X509Request{{
		Kind: ca.Mesh, ID: i.id, DNSNames: i.dns, PublicKey: key.Public(), Cluster: i.cluster, Rule: ruleIstiod,
	}})
	if err == nil {
		err = svids[0].Err
	}
	if err != nil {
		return kube.TLSSecret{}, nil, fmt.Errorf("issue istiod's certificate: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return kube.TLSSecret{}, nil, fmt.Errorf("encode istiod's key: %w", err)
	}
	will := kube.TLSSecret{Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), Roots: bundle.PEM()}
	for _, one := range svids[0].Chain {
		will.Chain = append(will.Chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: one})...)
	}
	leaf, err := x509.ParseCertificate(svids[0].Chain[0])
	if err != nil {
		return kube.TLSSecret{}, nil, fmt.Errorf("parse istiod's certificate: %w", err)
	}
	return will, leaf, nil
}
