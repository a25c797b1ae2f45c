package istioca

import (
	"context"
	"encoding/pem"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	istiov1 "istio.io/api/security/v1alpha1"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/kube"
	"github.com/seed-caa81108/assay/server/limit"
)

const (
	// answerWithin bounds a request: its clients wait for ever.
	answerWithin = 10 * time.Second
	// recordWithin bounds the line of a refusal, which is written however the request
	// ended.
	recordWithin = 5 * time.Second
	// shortest is the shortest life that a proxy gets, however short it asks for:
	// what lives less is renewed all the time.
	shortest = time.Minute
	// longestAsked keeps a life that is asked for below what overflows.
	longestAsked = 365 * 24 * 60 * 60 // seconds
	// strangerLines per second is what the audit log has of callers that proved
	// nothing; the log and the metrics have each.
	strangerLines = 10
	// failuresPerSecond is how many tokens that are nobody's one address may have
	// verified, and verifiedAtOnce how many tokens at a time.
	failuresPerSecond = 10
	verifiedAtOnce    = 16
	// refusalsPerSecond is what the audit log has of one caller's refusals; the log
	// and the metrics have each.
	refusalsPerSecond = 2
)

// Method is the only one.
const Method = istiov1.IstioCertificateService_CreateCertificate_FullMethodName

// Methods is the method table of the mesh's listener. The token decides, which
// only the handler can wait for.
func Methods() rpc.Methods { return rpc.Methods{Method: rpc.Anyone} }

// Authority signs; *ca.Authority does.
type Authority interface {
	IssueX509(ctx context.Context, by audit.Origin, reqs []ca.X509Request) ([]ca.X509SVID, error)
	Bundle() *ca.Bundle
}

// Auditor is the audit log. Record returns when the lines are on disk.
type Auditor interface {
	Record(ctx context.Context, lines ...audit.Line) error
}

// Clusters know whose a token is and what runs where; *kube.Clusters do.
type Clusters interface {
	Review(ctx context.Context, cluster, token string, audiences []string) (kube.Account, error)
	AccountIdentity(cluster, namespace, account string) (id spiffeid.ID, ttl time.Duration, ok bool)
	CheckBound(context.Context, kube.Account) error
	NodeOf(context.Context, kube.Account) (string, error)
	RunsOn(ctx context.Context, cluster, node, namespace, account string) error
}

// Options is what a Service is made of; all fields are needed.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Config      Config // with defaults, checked
	// DefaultTTL is how long a certificate lives for which nothing is asked.
	DefaultTTL time.Duration
	Authority  Authority
	Clusters   Clusters
	Audit      Auditor
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Service implements istiov1.IstioCertificateServiceServer.
type Service struct {
	istiov1.UnimplementedIstioCertificateServiceServer
	cfg       Config
	td        spiffeid.TrustDomain
	floor     time.Duration
	authority Authority
	clusters  Clusters
	sources   []*source // by name
	audit     Auditor
	log       *slog.Logger
	metrics   *metrics
	requests  *limit.Rates // by caller
	refusals  *limit.Rates // likewise
	failures  *limit.Rates // by address
	verifying *turns       // likewise
	// The same, ten times as much, by network: of IPv6 one peer may have all of it.
	networkFailures  *limit.Rates
	networkVerifying *turns
	strangers        *rate.Limiter
}

// source is a cluster with how its tokens are verified.
type source struct {
	name     string
	cfg      ClusterConfig
	verifier verifier
}

// New returns a service. It reads the files of OIDC clusters and asks nobody
// yet: Run keeps their keys current.
func New(o Options) (*Service, error) {
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, err
	}
	s := &Service{
		cfg: o.Config, td: o.TrustDomain, floor: min(shortest, o.DefaultTTL), authority: o.Authority, clusters: o.Clusters,
		audit: o.Audit, log: o.Log, metrics: m, requests: limit.NewRates(o.Config.RequestRate), failures: limit.NewRates(failuresPerSecond),
		refusals: limit.NewRates(refusalsPerSecond), verifying: newTurns(verifiedAtOnce),
		networkFailures: limit.NewRates(10 * failuresPerSecond), networkVerifying: newTurns(10 * verifiedAtOnce),
		strangers: rate.NewLimiter(strangerLines, 10*strangerLines),
	}
	for _, cluster := range slices.Sorted(maps.Keys(o.Config.Clusters)) {
		from := &source{name: cluster, cfg: o.Config.Clusters[cluster]}
		if from.verifier, err = s.verifierOf(from); err != nil {
			return nil, err
		}
		s.sources = append(s.sources, from)
	}
	return s, nil
}

func (s *Service) verifierOf(from *source) (verifier, error) {
	if from.cfg.OIDC != nil {
		return newOIDC(from.name, from.cfg, s.cfg.Audiences)
	}
	r := newReviews(s.metrics.reviews.WithLabelValues(from.name), func(ctx context.Context, token string) (kube.Account, error) {
		return s.clusters.Review(ctx, from.name, token, s.cfg.Audiences)
	})
	r.tell = func(err error) {
		s.log.LogAttrs(context.Background(), slog.LevelWarn, "a cluster gives no answers about tokens: its proxies get no certificates and are told to come again",
			slog.String("cluster", from.name), slog.String("error", err.Error()))
	}
	return r, s.metrics.watch(from.name, r.breaker)
}

// Register puts the service on a server, which has to have Methods as its table.
func (s *Service) Register(srv *grpc.Server) { istiov1.RegisterIstioCertificateServiceServer(srv, s) }

// Run keeps the keys of OIDC clusters current until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	var all sync.WaitGroup
	for _, from := range s.sources {
		if o, ok := from.verifier.(*oidc); ok {
			all.Go(func() { o.keys.run(ctx, func(err error) { s.tellKeys(ctx, from.name, err) }) })
		}
	}
	all.Wait()
	return nil
}

func (s *Service) tellKeys(ctx context.Context, cluster string, err error) {
	if err != nil {
		s.log.LogAttrs(ctx, slog.LevelWarn, "the keys of a cluster can't be had: an hour after the last answer its tokens are not believed",
			slog.String("cluster", cluster), slog.String("error", err.Error()))
	}
}

// CreateCertificate implements istiov1.IstioCertificateServiceServer; the
// package's description has the steps.
func (s *Service) CreateCertificate(ctx context.Context, req *istiov1.IstioCertificateRequest) (*istiov1.IstioCertificateResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	_, impersonate := req.GetMetadata().GetFields()[keyImpersonate]
	chain, err := s.create(ctx, req)
	s.metrics.count(err, impersonate)
	if err != nil {
		return nil, err
	}
	return &istiov1.IstioCertificateResponse{CertChain: chain}, nil
}

func (s *Service) create(ctx context.Context, req *istiov1.IstioCertificateRequest) ([]string, error) {
	from, caller, err := s.authenticate(ctx)
	if err != nil {
		return nil, s.refuse(ctx, nil, req, err)
	}
	what, err := s.decide(ctx, from, caller, req)
	if err != nil {
		return nil, s.refuse(ctx, &caller, req, err)
	}
	svids, err := s.authority.IssueX509(ctx, s.origin(ctx, &caller), []ca.X509Request{what})
	if err != nil {
		return nil, err
	}
	if svids[0].Err != nil {
		return nil, svids[0].Err // its line is written
	}
	return chain(svids[0].Chain, s.authority.Bundle()), nil
}

// authenticate says whose token a request has. Who proves nothing hears no more
// than that.
func (s *Service) authenticate(ctx context.Context) (*source, kube.Account, error) {
	from, caller, err := s.believe(ctx)
	if err != nil && fault.KindOf(err) != fault.NotReady {
		err = notAuthenticated(err)
	}
	return from, caller, err
}

func (s *Service) believe(ctx context.Context) (*source, kube.Account, error) {
	t, err := bearer(ctx, s.cfg.Audiences)
	if err != nil {
		return nil, kube.Account{}, err
	}
	from, err := s.choose(ctx, t.issuer)
	if err != nil {
		return nil, kube.Account{}, err
	}
	caller, err, known := from.verifier.known(t)
	if !known {
		caller, err = s.verify(ctx, from, t)
	}
	switch {
	case err != nil:
		return nil, kube.Account{}, err
	case caller.PodName == "" && !s.cfg.UnboundTokens:
		return nil, kube.Account{}, refused("not_bound", "the token is not bound to a pod: set istio.unbound_tokens if such are to count")
	}
	return from, caller, nil
}

// verify has a token verified whose address has not sent too many that were
// nobody's.
func (s *Service) verify(ctx context.Context, from *source, t token) (kube.Account, error) {
	addr := rpc.CallerFrom(ctx).Addr
	host, network := limit.AddressOf(addr), limit.HostOf(addr)
	give, err := s.verifying.take(ctx, host)
	if err != nil {
		return kube.Account{}, err
	}
	defer give()
	giveNetwork, err := s.networkVerifying.take(ctx, network)
	if err != nil {
		return kube.Account{}, err
	}
	defer giveNetwork()
	if s.failures.Wait(host, time.Now()) > 0 || s.networkFailures.Wait(network, time.Now()) > 0 {
		return kube.Account{}, refused("limit_failed_tokens", "too many tokens of this address were nobody's: it is not asked about more for a while")
	}
	caller, err := from.verifier.verify(ctx, t)
	if fault.KindOf(err) == fault.Denied {
		s.failures.Take(host, 1, time.Now())
		s.networkFailures.Take(network, 1, time.Now())
	}
	return caller, err
}

// key tells callers apart.
func key(a kube.Account) string { return a.Cluster + "/" + a.Namespace + "/" + a.Name + "/" + a.PodUID }

// decide says what is to be signed for a caller.
func (s *Service) decide(ctx context.Context, from *source, caller kube.Account, req *istiov1.IstioCertificateRequest) (ca.X509Request, error) {
	if s.requests.Take(key(caller), 1, time.Now()) > 0 {
		return ca.X509Request{}, fault.New(fault.Denied, "limit_requests", "this caller asks for too many certificates per second: see istio.requests_per_second_per_caller")
	}
	g, err := s.authorize(ctx, from, caller, req.GetMetadata())
	if err != nil {
		return ca.X509Request{}, err
	}
	pub, err := ca.ParseMeshCSR([]byte(req.GetCsr()), g.id)
	if err != nil {
		if g.rule == ruleNode && fault.ReasonOf(err) == "csr_identity_mismatch" {
			err = notImpersonated(err)
		}
		return ca.X509Request{}, err
	}
	return ca.X509Request{
		Kind: ca.Mesh, ID: g.id, PublicKey: pub, TTL: s.life(req.GetValidityDuration(), g.ttl), Cluster: caller.Cluster, Rule: g.rule,
	}, nil
}

// life is how long a certificate is to live for which so many seconds were asked,
// where a rule may say less; zero: as long as others. The authority cuts it to its
// cap. Proxies ask for a day, whatever they get; as with istiod, nothing and less
// is as good as no wish.
func (s *Service) life(asked int64, rule time.Duration) time.Duration {
	if asked <= 0 {
		return rule
	}
	life := max(s.floor, time.Duration(min(asked, longestAsked))*time.Second)
	if rule > 0 {
		return min(life, rule)
	}
	return life
}

// chain is the answer: the leaf, its issuer, and as the last element all roots,
// sorted: the same bytes until the bundle changes, which is how istio-agent
// notices that it did.
func chain(der [][]byte, bundle *ca.Bundle) []string {
	out := make([]string, 0, len(der)+1)
	for _, one := range der {
		out = append(out, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: one})))
	}
	return append(out, string(bundle.PEM()))
}

// refuse writes down why nothing was signed, as often as the audit log can take it
// of each caller that proved who it is, and of all others together.
func (s *Service) refuse(ctx context.Context, caller *kube.Account, req *istiov1.IstioCertificateRequest, err error) error {
	if caller == nil && !s.strangers.Allow() || caller != nil && s.refusals.Take(key(*caller), 1, time.Now()) > 0 {
		return err
	}
	line := audit.Line{
		Origin: s.origin(ctx, caller), Action: "x509_svid.issue", Why: audit.Why{Rule: ruleToken},
		Result: audit.Result{Code: fault.KindOf(err).Error(), Reason: fault.ReasonOf(err), Cause: fault.CauseOf(err)},
	}
	if wanted, ok := req.GetMetadata().GetFields()[keyImpersonate]; ok {
		line.Why.Rule = ruleNode
		if id, err := name.ParseID(wanted.GetStringValue()); err == nil {
			line.Target.SPIFFEID = id.String()
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordWithin)
	defer cancel()
	if aerr := s.audit.Record(ctx, line); aerr != nil {
		return fault.Wrap(fault.NotReady, aerr, fault.ReasonOf(aerr), "the audit log can't be written: retry")
	}
	return err
}

// origin says who asked and from where, for the audit log.
func (s *Service) origin(ctx context.Context, caller *kube.Account) audit.Origin {
	by := audit.Origin{RequestID: rpc.RequestID(ctx), Actor: audit.Actor{Kind: "none"}, From: rpc.CallerFrom(ctx).Addr}
	if caller == nil {
		return by
	}
	by.Actor = audit.Actor{Kind: "proxy", Kubernetes: &audit.Kubernetes{
		Cluster: caller.Cluster, Namespace: caller.Namespace, ServiceAccount: caller.Name,
		Pod: caller.PodName, PodUID: caller.PodUID, Node: caller.NodeName,
	}}
	if id, _, ok := s.clusters.AccountIdentity(caller.Cluster, caller.Namespace, caller.Name); ok {
		by.Actor.SPIFFEID = id.String()
	}
	return by
}
