package endpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	"github.com/seed-caa81108/assay/agent/attest"
	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// The header of every request (SPIFFE Workload Endpoint section 3).
const (
	headerKey   = "workload.spiffe.io"
	headerValue = "true"
)

// Subscription follows what one caller may have. *cache.Subscription is one.
type Subscription interface {
	// Changed receives after Snapshot's answer has changed.
	Changed() <-chan struct{}
	// Snapshot returns the complete state, or why there is none.
	Snapshot() (*cache.Snapshot, error)
	// Hurry says that the caller waits no longer for what may become known of it.
	// Snapshot can have another answer by that.
	Hurry()
	// Selectors are all that is known of the caller.
	Selectors() selector.Set
	// Sent says that a snapshot was written to the caller's stream.
	Sent(*cache.Snapshot)
	Close()
}

var _ Subscription = (*cache.Subscription)(nil)

// Config is what New needs.
type Config struct {
	Attestor *attest.Attestor
	// Subscribe follows the state for a caller, by what the attestor says of it.
	Subscribe func(selector.Set) Subscription
	Limits    Limits
	SDS       SDSConfig
	// MessageTimeout is how long a caller may take from the headers of a call to
	// its message; default 10 s. How long it is held after that is not bound by it.
	MessageTimeout time.Duration
	Log            *slog.Logger
	Calls          *rpc.Metrics
	Registerer     prometheus.Registerer
}

// timing has the waits of the protocol; tests shorten them.
type timing struct {
	hold     time.Duration // for a caller without a deadline
	holdMost time.Duration // for one with a deadline, at most half of it
	pending  time.Duration // for the successor of what was revoked
	send     time.Duration // until a stream counts as stalled
	shed     time.Duration // that a connection beyond the limits stays
	grace    time.Duration // for streams to end at shutdown
	pace     time.Duration // between the requests of one SDS stream, after the first hundred
}

var defaultTiming = timing{
	hold: 10 * time.Second, holdMost: 2 * time.Second, pending: 10 * time.Second,
	send: 10 * time.Second, shed: 2 * time.Second, grace: 2 * time.Second, pace: 10 * time.Millisecond,
}

// Server is the agent's endpoint: the Workload API and SDS, a socket each.
// Limits, attestor and metrics are for both together.
type Server struct {
	attestor  *attest.Attestor
	subscribe func(selector.Set) Subscription
	gate      *gate
	log       *slog.Logger
	metrics   *metrics
	timing    timing
	secrets   SDSConfig
	nacks     *nackLog
	api, sds  *grpc.Server
	stopping  chan struct{}
	tails     sync.WaitGroup // sends and receives that outlive their handler for a moment

	mu   sync.Mutex
	open map[*conn]struct{}
}

// New returns an endpoint that serves nothing yet.
func New(cfg Config) (*Server, error) {
	if err := cfg.Limits.Check(); err != nil {
		return nil, err
	}
	if err := cfg.SDS.Check(); err != nil {
		return nil, err
	}
	limits := cfg.Limits.withDefaults()
	gate := newGate(limits)
	s := &Server{
		attestor: cfg.Attestor, subscribe: cfg.Subscribe, gate: gate, log: cfg.Log,
		metrics: newMetrics(cfg.Registerer, gate), timing: defaultTiming, stopping: make(chan struct{}),
		secrets: cfg.SDS.WithDefaults(), nacks: newNACKLog(cfg.Log), open: map[*conn]struct{}{},
	}
	common := rpc.ServerConfig{
		Creds:          handshake{cfg.Attestor.Credentials(), s},
		MessageTimeout: cmp.Or(cfg.MessageTimeout, 10*time.Second),
		// Above the limit per user, so that what is too much is refused: gRPC's
		// own limit makes clients wait in silence.
		MaxStreams: uint32(limits.StreamsPerUID) + 100,
		Log:        cfg.Log, Metrics: cfg.Calls, RefusalsPerSecond: 10,
	}
	s.api = s.newAPI(common)
	s.sds = s.newSDS(common)
	return s, nil
}

func (s *Server) newAPI(cfg rpc.ServerConfig) *grpc.Server {
	cfg.Name, cfg.Methods, cfg.HeaderKey, cfg.HeaderValue = "api", Methods(), headerKey, headerValue
	cfg.Options = s.options(streams)
	api := rpc.NewServer(cfg)
	workload.RegisterSpiffeWorkloadAPIServer(api, workloadAPI{server: s})
	// Clients that find no reflection assume that the endpoint has the Workload
	// API only (WL-16).
	reflection.Register(api)
	return api
}

// newSDS makes the server of the socket for Envoy. There is no header to demand:
// neither Envoy nor istio-agent sends one.
func (s *Server) newSDS(cfg rpc.ServerConfig) *grpc.Server {
	cfg.Name, cfg.Methods, cfg.MaxRecvBytes = "sds", SDSMethods(), maxSDSRequest
	cfg.Options = s.options(streams, secretStreams)
	sds := rpc.NewServer(cfg)
	secretv3.RegisterSecretDiscoveryServiceServer(sds, secretDiscovery{server: s})
	return sds
}

// options of a socket whose calls count as each of what they take.
func (s *Server) options(takes ...resource) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainStreamInterceptor(s.countedStream(takes)),
		grpc.ChainUnaryInterceptor(s.countedCall(takes)),
		grpc.ForceServerCodecV2(newCodec()),
		// Requests are a few bytes: small buffers do, and fixed windows save
		// the pings that gRPC would measure bandwidth with.
		grpc.ReadBufferSize(4 << 10),
		grpc.StaticStreamWindowSize(64 << 10),
		grpc.StaticConnWindowSize(64 << 10),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 10 * time.Minute}),
	}
}

// Methods is the method table of the Workload API's socket (I11). Who calls is
// established per connection and judged in the handler, which can wait; the
// rules here only demand that it was established.
func Methods() rpc.Methods {
	return rpc.Methods{
		workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName:                localCaller,
		workload.SpiffeWorkloadAPI_FetchX509Bundles_FullMethodName:             localCaller,
		workload.SpiffeWorkloadAPI_FetchJWTSVID_FullMethodName:                 rpc.NotImplemented,
		workload.SpiffeWorkloadAPI_FetchJWTBundles_FullMethodName:              rpc.NotImplemented,
		workload.SpiffeWorkloadAPI_ValidateJWTSVID_FullMethodName:              rpc.NotImplemented,
		workload.SpiffeWorkloadAPI_FetchWITSVID_FullMethodName:                 rpc.NotImplemented,
		workload.SpiffeWorkloadAPI_FetchWITBundles_FullMethodName:              rpc.NotImplemented,
		reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName:      localCaller,
		reflectionv1alpha.ServerReflection_ServerReflectionInfo_FullMethodName: localCaller,
	}
}

// SDSMethods is the method table of the socket for Envoy (I11).
func SDSMethods() rpc.Methods {
	return rpc.Methods{
		secretv3.SecretDiscoveryService_StreamSecrets_FullMethodName: localCaller,
		secretv3.SecretDiscoveryService_FetchSecrets_FullMethodName:  localCaller,
		secretv3.SecretDiscoveryService_DeltaSecrets_FullMethodName:  rpc.NotImplemented,
	}
}

func localCaller(c rpc.Caller) error {
	if !c.Local {
		return fault.New(fault.Denied, "caller_unresolvable", "this socket serves processes of its own host only")
	}
	return nil
}

// Sockets are the Unix listeners of a Server.
type Sockets struct {
	API net.Listener // the Workload API
	SDS net.Listener // Envoy's secret discovery service
}

// Serve serves both sockets until ctx ends, then ends all streams with
// Unavailable and closes the listeners. A Server serves once.
func (s *Server) Serve(ctx context.Context, sockets Sockets) error {
	ended := make(chan error, 2)
	serve := func(server *grpc.Server, lis net.Listener) {
		ended <- server.Serve(&listener{Listener: s.attestor.Listener(lis), server: s, closed: make(chan struct{})})
	}
	go serve(s.api, sockets.API)
	go serve(s.sds, sockets.SDS)
	running := cap(ended)
	var errs []error
	take := func(err error) {
		running--
		if err != nil && !errors.Is(err, grpc.ErrServerStopped) { // stopped before it began
			errs = append(errs, fmt.Errorf("serve workloads: %w", err))
		}
	}
	select {
	case err := <-ended:
		take(err)
	case <-ctx.Done():
	}
	s.stop()
	for running > 0 {
		take(<-ended)
	}
	return errors.Join(errs...)
}

// stop ends all streams with a status that makes clients come back, and gives
// them a moment to read it (WL-24). Then it closes what is left, connections
// that never said a word included: gRPC would wait for those.
func (s *Server) stop() {
	close(s.stopping)
	servers := []*grpc.Server{s.api, s.sds}
	force := time.AfterFunc(s.timing.grace, func() {
		s.closeConnections()
		for _, server := range servers {
			server.Stop()
		}
	})
	var stopped sync.WaitGroup
	for _, server := range servers {
		stopped.Go(server.GracefulStop)
	}
	stopped.Wait()
	force.Stop()
	s.tails.Wait()
}

func (s *Server) closeConnections() {
	s.mu.Lock()
	open := slices.Collect(maps.Keys(s.open))
	s.mu.Unlock()
	for _, c := range open {
		_ = c.Close()
	}
}

func (s *Server) track(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[c] = struct{}{}
}

func (s *Server) forget(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
}
