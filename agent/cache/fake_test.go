package cache_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// authority is a root with an issuer under it, as servers have one.
type authority struct {
	cert, issuer   *x509.Certificate
	key, issuerKey *ecdsa.PrivateKey
	tainted        bool
	retired        bool
}

func newKey() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

func newAuthority(name string) *authority {
	a := &authority{key: newKey(), issuerKey: newKey()}
	a.cert = sign(caTemplate(name), nil, &a.key.PublicKey, a.key)
	a.issuer = sign(caTemplate(name+" issuer"), a.cert, &a.issuerKey.PublicKey, a.key)
	return a
}

func caTemplate(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()},
	}
}

func leafTemplate(id spiffeid.ID, ttl time.Duration) *x509.Certificate {
	return &x509.Certificate{
		NotBefore: time.Now().Add(-min(ttl/4, 2*time.Minute)), NotAfter: time.Now().Add(ttl), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{id.URL()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func sign(template, parent *x509.Certificate, pub crypto.PublicKey, by *ecdsa.PrivateKey) *x509.Certificate {
	template.SerialNumber = must(rand.Int(rand.Reader, big.NewInt(1<<62)))
	if template.IsCA {
		sum := sha256.Sum256(must(x509.MarshalPKIXPublicKey(pub)))
		template.SubjectKeyId = sum[:20]
	}
	if parent == nil {
		parent = template
	}
	return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, parent, pub, by))))
}

func (a *authority) id() string { return hex.EncodeToString(a.cert.SubjectKeyId) }

// fake is a server that keeps entries and signs for them.
type fake struct {
	agentv1.UnimplementedAgentServer
	mu       sync.Mutex
	epoch    string
	revision int64
	entries  map[string]*agentv1.Entry
	changes  []change
	signer   *authority
	sequence uint64
	bundled  []*authority
	streams  map[*fakeStream]struct{}
	asked    []string                // keys, one for each item of each call
	pods     map[string]*agentv1.Pod // nil: the node is none of Kubernetes
	verdict  error                   // ends and refuses streams
	ttl      time.Duration

	hellos  []*agentv1.SyncRequest_Hello
	acks    []*agentv1.SyncRequest_Ack
	reports []*agentv1.SyncRequest_Report
	signed  []string // entry IDs in the order of arrival
	batches [][]string
	keys    map[string]int // keys that were certified
	// refuse fails items of these entries; hold, if set, delays every answer
	// until it is closed; bad, if set, changes a chain; oldest makes every
	// snapshot come in chunks of one entry.
	refuse map[string]error
	broken error // fails whole batches
	clock  func() time.Time
	limit  func(items int) error // may refuse a batch
	until  []time.Time           // of each batch: the end of what it replaces
	hold   chan struct{}
	slow   time.Duration // of each batch
	bad    func(id spiffeid.ID, chain [][]byte) [][]byte
	chunk  int

	lis    *bufconn.Listener
	server *grpc.Server
}

type change struct {
	revision int64
	entry    *agentv1.Entry
	removed  string
}

type fakeStream struct{ out chan []*agentv1.SyncResponse }

func newFake() *fake {
	root := newAuthority("root 1")
	return &fake{
		epoch: "epoch-1", entries: map[string]*agentv1.Entry{}, signer: root, sequence: 1, bundled: []*authority{root},
		clock: time.Now, streams: map[*fakeStream]struct{}{}, ttl: time.Hour, keys: map[string]int{}, refuse: map[string]error{}, chunk: 1 << 30,
	}
}

func (f *fake) start() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lis = bufconn.Listen(1 << 20)
	f.server = grpc.NewServer()
	agentv1.RegisterAgentServer(f.server, f)
	go func(s *grpc.Server, l net.Listener) { _ = s.Serve(l) }(f.server, f.lis)
}

func (f *fake) stop() {
	f.mu.Lock()
	s := f.server
	f.lis, f.server = nil, nil
	f.mu.Unlock()
	if s != nil {
		s.Stop()
	}
}

func (f *fake) with(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

// seen is what the server was told and asked for.
type seen struct {
	signed  []string
	batches [][]string
	hellos  []*agentv1.SyncRequest_Hello
	acks    []*agentv1.SyncRequest_Ack
	keys    map[string]int
	streams int
}

func (f *fake) seen() seen {
	f.mu.Lock()
	defer f.mu.Unlock()
	return seen{
		signed: slices.Clone(f.signed), batches: slices.Clone(f.batches), hellos: slices.Clone(f.hellos),
		acks: slices.Clone(f.acks), keys: maps.Clone(f.keys), streams: len(f.streams),
	}
}

func (f *fake) bundle() *agentv1.TrustBundle {
	b := &agentv1.TrustBundle{TrustDomain: td.Name(), Sequence: f.sequence}
	for _, a := range f.bundled {
		b.X509Authorities = append(b.X509Authorities, &agentv1.Authority{Id: a.id(), Certificate: a.cert.Raw, Tainted: a.tainted, Retired: a.retired})
	}
	return b
}

// changeBundle changes the authorities, raises the sequence and tells agents.
func (f *fake) changeBundle(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
	f.sequence++
	f.push(&agentv1.SyncResponse{Epoch: f.epoch, Revision: f.revision, Bundle: f.bundle()})
}

func (f *fake) push(msgs ...*agentv1.SyncResponse) {
	for s := range f.streams {
		select {
		case s.out <- msgs:
		default:
			panic("stream is full")
		}
	}
}

// judge ends all streams with err and refuses new ones until it is nil.
func (f *fake) judge(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.verdict = err; err != nil {
		f.push()
	}
}

func (f *fake) judgement() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.verdict
}

// set makes or changes entries in one commit, remove deletes.
func (f *fake) set(entries ...*agentv1.Entry) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.revision++
	for _, e := range entries {
		f.entries[e.GetId()] = e
		f.changes = append(f.changes, change{revision: f.revision, entry: e})
	}
	f.push(&agentv1.SyncResponse{Epoch: f.epoch, Revision: f.revision, Entries: entries, CommittedAt: timestamppb.Now()})
}

func (f *fake) remove(ids ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.revision++
	for _, id := range ids {
		delete(f.entries, id)
		f.changes = append(f.changes, change{revision: f.revision, removed: id})
	}
	f.push(&agentv1.SyncResponse{Epoch: f.epoch, Revision: f.revision, RemovedEntryIds: ids, CommittedAt: timestamppb.Now()})
}

func (f *fake) first(h *agentv1.SyncRequest_Hello) []*agentv1.SyncResponse {
	msg := &agentv1.SyncResponse{Epoch: f.epoch, Revision: f.revision, Bundle: f.bundle()}
	if h.GetEpoch() == f.epoch && h.GetRevision() > 0 {
		for _, c := range f.changes {
			if c.revision <= h.GetRevision() {
				continue
			}
			if c.entry != nil {
				msg.Entries = append(msg.Entries, c.entry)
			} else {
				msg.RemovedEntryIds = append(msg.RemovedEntryIds, c.removed)
			}
		}
		// The last word on each entry counts.
		msg.Entries = slices.DeleteFunc(msg.Entries, func(e *agentv1.Entry) bool { return f.entries[e.GetId()] != e })
		msg.RemovedEntryIds = slices.DeleteFunc(msg.RemovedEntryIds, func(id string) bool { return f.entries[id] != nil })
		return []*agentv1.SyncResponse{msg}
	}
	msg.Snapshot = true
	msgs := []*agentv1.SyncResponse{msg}
	for _, id := range slices.Sorted(maps.Keys(f.entries)) {
		if len(msg.Entries) == f.chunk {
			msg.More = true
			msg = &agentv1.SyncResponse{Epoch: f.epoch, Revision: f.revision, Snapshot: true}
			msgs = append(msgs, msg)
		}
		msg.Entries = append(msg.Entries, f.entries[id])
	}
	return msgs
}

func (f *fake) podsMessage(snapshot bool, pods []*agentv1.Pod, removed ...string) *agentv1.SyncResponse {
	return &agentv1.SyncResponse{Epoch: f.epoch, Revision: f.revision, Pods: &agentv1.PodChanges{Snapshot: snapshot, Pods: pods, RemovedUids: removed}}
}

// run says that pods run on the node from now on, end that one does not.
func (f *fake) run(pods ...*agentv1.Pod) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range pods {
		f.pods[p.GetUid()] = p
	}
	f.push(f.podsMessage(false, pods))
}

func (f *fake) end(uid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.pods, uid)
	f.push(f.podsMessage(false, nil, uid))
}

func (f *fake) Sync(stream grpc.BidiStreamingServer[agentv1.SyncRequest, agentv1.SyncResponse]) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	s := &fakeStream{out: make(chan []*agentv1.SyncResponse, 4096)}
	f.mu.Lock()
	if err := f.verdict; err != nil {
		f.mu.Unlock()
		return fault.Status(err, "R").Err()
	}
	f.hellos = append(f.hellos, req.GetHello())
	s.out <- f.first(req.GetHello())
	if f.pods != nil {
		s.out <- []*agentv1.SyncResponse{f.podsMessage(true, slices.Collect(maps.Values(f.pods)))}
	}
	f.streams[s] = struct{}{}
	f.mu.Unlock()
	defer f.with(func() { delete(f.streams, s) })
	go func() {
		for {
			req, err := stream.Recv()
			if err != nil {
				return
			}
			f.with(func() {
				if a := req.GetAck(); a != nil {
					f.acks = append(f.acks, a)
				}
				if r := req.GetReport(); r != nil {
					f.reports = append(f.reports, r)
				}
			})
		}
	}()
	for {
		select {
		case msgs := <-s.out:
			if msgs == nil {
				return fault.Status(f.judgement(), "R").Err()
			}
			for _, m := range msgs {
				m := proto.CloneOf(m)
				m.ServerTime = timestamppb.New(f.clock())
				if err := stream.Send(m); err != nil {
					return err
				}
			}
		case <-stream.Context().Done():
			return fault.Status(fault.New(fault.NotReady, "shutting_down", "x"), "R").Err()
		}
	}
}

func (f *fake) keysAsked() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.asked)
}

func (f *fake) SignX509(ctx context.Context, req *agentv1.SignX509Request) (*agentv1.SignX509Response, error) {
	f.mu.Lock()
	var batch []string
	for _, item := range req.GetItems() {
		batch = append(batch, item.GetEntryId())
		if csr, err := x509.ParseCertificateRequest(item.GetCsr()); err == nil {
			f.asked = append(f.asked, hex.EncodeToString(csr.RawSubjectPublicKeyInfo))
		}
	}
	f.signed = append(f.signed, batch...)
	f.batches = append(f.batches, batch)
	hold, broken, slow := f.hold, f.broken, f.slow
	f.until = append(f.until, req.GetReplacesUntil().AsTime())
	if broken == nil && f.limit != nil {
		broken = f.limit(len(batch))
	}
	f.mu.Unlock()
	if slow > 0 {
		<-time.After(slow)
	}
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if broken != nil {
		return nil, fault.Status(broken, "R").Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &agentv1.SignX509Response{}
	for _, item := range req.GetItems() {
		resp.Results = append(resp.Results, f.sign(item))
	}
	return resp, nil
}

func (f *fake) sign(item *agentv1.SignX509Request_Item) *agentv1.SignX509Response_Result {
	failure := func(code codes.Code, reason string) *agentv1.SignX509Response_Result {
		return &agentv1.SignX509Response_Result{Outcome: &agentv1.SignX509Response_Result_Failure{
			Failure: &agentv1.SignX509Response_Failure{Code: int32(code), Reason: reason, Message: reason},
		}}
	}
	csr, err := x509.ParseCertificateRequest(item.GetCsr())
	if err != nil || csr.CheckSignature() != nil || len(csr.Subject.Names) > 0 || len(csr.Extensions) > 0 {
		return failure(codes.InvalidArgument, "csr_malformed")
	}
	if err := f.refuse[item.GetEntryId()]; err != nil {
		return failure(fault.Code(fault.KindOf(err)), fault.ReasonOf(err))
	}
	e := f.entries[item.GetEntryId()]
	if uid, ok := strings.CutPrefix(item.GetEntryId(), "pod/"); ok {
		e = f.pods[uid].GetIdentity()
	}
	if e == nil {
		return failure(codes.NotFound, "entry_not_authorized")
	}
	f.keys[hex.EncodeToString(csr.RawSubjectPublicKeyInfo)]++
	ttl := f.ttl
	if e.GetX509SvidTtl() != nil {
		ttl = e.GetX509SvidTtl().AsDuration()
	}
	id := spiffeid.RequireFromString(e.GetSpiffeId())
	template := leafTemplate(id, ttl)
	template.DNSNames = e.GetDnsNames()
	ahead := time.Until(f.clock())
	template.NotBefore, template.NotAfter = template.NotBefore.Add(ahead), template.NotAfter.Add(ahead)
	leaf := sign(template, f.signer.issuer, csr.PublicKey, f.signer.issuerKey)
	chain := [][]byte{leaf.Raw, f.signer.issuer.Raw}
	if f.bad != nil {
		chain = f.bad(id, chain)
	}
	return &agentv1.SignX509Response_Result{Outcome: &agentv1.SignX509Response_Result_Chain{
		Chain: &agentv1.SignX509Response_Chain{Certificates: chain},
	}}
}

// connector is what package node does: a connection that can be replaced.
type connector struct {
	fake *fake
	mu   sync.Mutex
	conn *fakeConn
	old  []*fakeConn
	none bool // nobody is connected
}

type fakeConn struct {
	fake     *fake
	cc       *grpc.ClientConn
	replaced chan struct{}
}

func (c *fakeConn) Client() agentv1.AgentClient { return agentv1.NewAgentClient(c.cc) }
func (c *fakeConn) Replaced() <-chan struct{}   { return c.replaced }
func (c *fakeConn) Release()                    {}

func (c *fakeConn) Ready(ctx context.Context) error {
	c.fake.mu.Lock()
	up := c.fake.lis != nil
	c.fake.mu.Unlock()
	if !up {
		return fault.New(fault.NotReady, "server_unreachable", "the server at server:8443 can't be reached")
	}
	c.cc.Connect()
	for state := c.cc.GetState(); state != connectivity.Ready; state = c.cc.GetState() {
		if !c.cc.WaitForStateChange(ctx, state) {
			return ctx.Err()
		}
	}
	return nil
}

func (c *connector) Conn(ctx context.Context) (cache.Conn, error) {
	c.mu.Lock()
	none := c.none
	if !none && c.conn == nil {
		c.conn = c.dial()
	}
	conn := c.conn
	c.mu.Unlock()
	if none {
		<-ctx.Done()
		return nil, fault.Wrap(fault.NotReady, ctx.Err(), "server_unreachable", "x")
	}
	return conn, nil
}

func (c *connector) dial() *fakeConn {
	cc := must(grpc.NewClient("passthrough:///server", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c.fake.mu.Lock()
			lis := c.fake.lis
			c.fake.mu.Unlock()
			if lis == nil {
				return nil, io.ErrClosedPipe
			}
			return lis.DialContext(ctx)
		}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, MaxDelay: 5 * time.Second}}),
		grpc.WithIdleTimeout(0)))
	return &fakeConn{fake: c.fake, cc: cc, replaced: make(chan struct{})}
}

func (c *connector) replace() {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.conn.replaced)
	c.old = append(c.old, c.conn)
	c.conn = c.dial()
}

func (c *connector) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, old := range append(c.old, c.conn) {
		if old != nil {
			_ = old.cc.Close()
		}
	}
	c.conn, c.old = nil, nil
}

func (a *agent) start() {
	a.t.Helper()
	if a.state == nil {
		a.open()
	}
	a.reg = prometheus.NewRegistry()
	var err error
	a.cache, err = cache.New(cache.Options{
		TrustDomain: td, ReservedPrefix: "/assay/", RunDir: filepath.Join(a.dir, "run"), Version: "test",
		State: a.state, Connector: a.conns, Clock: a.clock, Log: slog.New(slog.NewTextHandler(a.log, nil)), Registerer: a.reg,
	})
	if err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel = cancel
	a.done = make(chan struct{})
	go func() {
		defer close(a.done)
		if err := a.cache.Run(ctx); err != nil {
			a.t.Error(err)
		}
	}()
}

func (a *agent) stop() {
	if a.cancel == nil {
		return
	}
	a.cancel()
	<-a.done
	a.cancel = nil
	a.conns.close()
	if a.state != nil {
		if err := a.state.Close(); err != nil {
			a.t.Error(err)
		}
		a.state = nil
	}
}

// stateBundle is the server's bundle as an agent's state holds it.
func stateBundle(f *fake) (*state.Bundle, error) {
	var roots []state.Authority
	for _, a := range f.bundled {
		root := must(state.ParseAuthority(a.id(), a.cert.Raw))
		root.Tainted, root.Retired = a.tainted, a.retired
		roots = append(roots, root)
	}
	return state.NewBundle(td, f.sequence, true, roots)
}

func last[T any](list []T) T { return list[len(list)-1] }
