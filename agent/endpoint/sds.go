package endpoint

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"slices"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// secretDiscovery implements Envoy's SDS in its state-of-the-world form; the
// incremental one answers Unimplemented before it gets here.
type secretDiscovery struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	server *Server
}

// StreamSecrets answers a client's requests and pushes what changes.
func (d secretDiscovery) StreamSecrets(stream grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
	return d.server.discover(stream, "StreamSecrets", d.server.receive(stream))
}

// FetchSecrets answers one request: a stream that ends with the first response.
func (d secretDiscovery) FetchSecrets(ctx context.Context, req *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	one := make(chan incoming, 1)
	one <- incoming{request: req}
	stream := &oneShot{ctx: ctx}
	err := d.server.discover(stream, "FetchSecrets", one)
	if errors.Is(err, errFetched) {
		return stream.response, nil
	}
	return nil, err
}

// oneShot plays the stream of a unary call.
type oneShot struct {
	grpc.ServerStream
	ctx      context.Context
	response *discoveryv3.DiscoveryResponse
}

var errFetched = errors.New("fetched")

func (o *oneShot) Context() context.Context { return o.ctx }

// SendMsg keeps the response and ends the stream.
func (o *oneShot) SendMsg(msg any) error {
	o.response = msg.(*discoveryv3.DiscoveryResponse)
	return nil
}

// incoming is what came from a client: a request, or how its requests ended.
type incoming struct {
	request *discoveryv3.DiscoveryRequest
	err     error
}

// burst is how many requests of a stream are taken as they come.
const burst = 100

// receive reads a stream's requests one by one: one that is not looked at yet
// keeps the next from being read, and many in a short time are slowed down. It
// ends with the stream at the latest, and stop waits for it.
func (s *Server) receive(stream grpc.ServerStream) <-chan incoming {
	requests := make(chan incoming)
	ctx, pace := stream.Context(), rate.NewLimiter(rate.Every(s.timing.pace), burst)
	s.tails.Go(func() {
		for pace.Wait(ctx) == nil {
			in := incoming{request: &discoveryv3.DiscoveryRequest{}}
			in.err = stream.RecvMsg(in.request)
			select {
			case requests <- in:
			case <-ctx.Done():
				return
			}
			if in.err != nil {
				return
			}
		}
	})
	return requests
}

// discover serves a stream of SDS from its first request on.
func (s *Server) discover(stream grpc.ServerStream, method string, requests <-chan incoming) error {
	who, err := callerFrom(stream.Context())
	if err != nil {
		return err
	}
	d := &discloser{follower: follower{server: s, stream: stream, who: who, incoming: requests}, method: method}
	d.heed = d.take
	select {
	case in := <-requests:
		if _, err := d.take(in); err != nil {
			return err
		}
	case <-stream.Context().Done():
		return errInterrupted
	case <-s.stopping:
		return errShutdown
	}
	if !d.asked {
		return fault.New(fault.Invalid, "request_missing", "the stream ended before its first request: send one")
	}
	return d.run(method, d.deliver)
}

// discloser is a follower that tells of snapshots as the secrets that its client
// asks for.
type discloser struct {
	follower
	dialogue
	method string
	// version of what the client was sent last, and the names that it was for.
	version string
	served  []string
}

// take takes in what came from the client.
func (d *discloser) take(in incoming) (asks bool, err error) {
	switch {
	case errors.Is(in.err, io.EOF):
		d.incoming = nil // it asks nothing more, and may well go on reading
		return false, nil
	case in.err != nil:
		return false, in.err
	}
	verdict, asks, err := d.dialogue.hear(in.request)
	if counter := d.server.metrics.updates[verdict]; counter != nil {
		counter.Inc()
	}
	if verdict == nacked {
		d.server.nacks.tell(d.stream.Context(), &d.dialogue, in.request)
	}
	return asks, err
}

// deliver sends what the client asks for, unless it was sent the same already:
// what it rejected is no better the second time.
func (d *discloser) deliver(snap *cache.Snapshot) error {
	resp, missing, err := d.server.secrets.compose(snap, d.names, d.plain)
	switch {
	case missing != "" && slices.Contains(d.served, missing):
		return fault.Newf(fault.Denied, "no_identity", "you no longer have %s", missing)
	case err != nil && fault.KindOf(err) != fault.Invalid:
		d.withheld(d.method, err)
		return err
	case err != nil:
		return err
	}
	if resp.GetVersionInfo() != d.version || !slices.Equal(d.names, d.served) {
		resp.Nonce = rand.Text()
		if err := d.push(snap, resp); err != nil {
			return err
		}
		d.said(resp.GetNonce())
		d.version, d.served = resp.GetVersionInfo(), d.names
	}
	d.has(snap)
	if _, once := d.stream.(*oneShot); once {
		return errFetched
	}
	return nil
}
