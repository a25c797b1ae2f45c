package endpoint

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
)

// What one request may ask for, and how long it may be. Names and a node's
// metadata fit into that; Envoy asks for one name per stream.
const (
	maxNames      = 100
	maxName       = 2048
	maxSDSRequest = 256 << 10
)

// secretType is the type_url of SDS.
const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// plainKey is the metadata of a node that can't take the SPIFFE validator.
const plainKey = "disable_spiffe_cert_validation"

// verdict is what a request says about the response before it.
type verdict int

const (
	silent verdict = iota // nothing, or nothing new
	acked
	nacked
)

// dialogue is what the client of an SDS stream wants, as far as the protocol
// tells: each request names all resources and, by its nonce, the response that
// it answers. Nothing in it says who the client is.
type dialogue struct {
	asked bool     // a request was heard
	names []string // that the client wants, sorted, each once; none: everything
	plain bool     // bundles go without the SPIFFE validator
	// nonce of the last response, empty before the first; settled: the client has
	// said whether it takes that one.
	nonce   string
	settled bool
}

// hear takes a request in. It returns what that says about the last response,
// and whether the client asks for something else now.
func (d *dialogue) hear(req *discoveryv3.DiscoveryRequest) (verdict, bool, error) {
	if d.nonce != "" && req.GetResponseNonce() != d.nonce {
		return silent, false, nil // crossed with a response: the answer to that counts
	}
	if t := req.GetTypeUrl(); t != "" && t != secretType {
		return silent, false, fault.New(fault.Invalid, "type_url_unknown", "this socket serves secrets: type_url has to be "+secretType)
	}
	names, err := namesOf(req)
	if err != nil {
		return silent, false, err
	}
	if !d.asked { // Envoy sends the node once
		d.plain = wantsPlain(req.GetNode())
	}
	asks := !d.asked || !slices.Equal(names, d.names)
	d.asked, d.names = true, names
	if d.nonce == "" || d.settled {
		return silent, asks, nil
	}
	d.settled = true
	if req.GetErrorDetail() != nil {
		return nacked, asks, nil
	}
	return acked, asks, nil
}

// said notes that a response was sent.
func (d *dialogue) said(nonce string) { d.nonce, d.settled = nonce, false }

func namesOf(req *discoveryv3.DiscoveryRequest) ([]string, error) {
	names := req.GetResourceNames()
	if len(names) > maxNames {
		return nil, fault.Newf(fault.Invalid, "resource_names_invalid", "a request may have %d names of resources: open another stream for more", maxNames)
	}
	for _, name := range names {
		if len(name) > maxName {
			return nil, fault.Newf(fault.Invalid, "resource_names_invalid", "the name of a resource may have %d bytes", maxName)
		}
	}
	names = slices.Clone(names) // the request is not kept
	slices.Sort(names)
	return slices.Compact(names), nil
}

func wantsPlain(node *corev3.Node) bool {
	switch v := node.GetMetadata().GetFields()[plainKey].GetKind().(type) {
	case *structpb.Value_BoolValue:
		return v.BoolValue
	case *structpb.Value_StringValue:
		return v.StringValue == "true" || v.StringValue == "1"
	}
	return false
}

// nackLog tells of rejected responses, not of every one: clients decide how many
// there are.
type nackLog struct {
	log        *slog.Logger
	lines      *rate.Limiter
	suppressed atomic.Int64
}

func newNACKLog(log *slog.Logger) *nackLog { return &nackLog{log: log, lines: rate.NewLimiter(1, 10)} }

// maxNACK bounds what the log has of a client's own words.
const maxNACK = 256

func (l *nackLog) tell(ctx context.Context, d *dialogue, req *discoveryv3.DiscoveryRequest) {
	if !l.lines.Allow() {
		l.suppressed.Add(1)
		return
	}
	caller := rpc.CallerFrom(ctx)
	attrs := []slog.Attr{
		slog.String("request_id", rpc.RequestID(ctx)), slog.Uint64("uid", uint64(caller.UID)), slog.Int64("pid", int64(caller.PID)),
		slog.Int("names", len(d.names)), slog.String("why", complaint(req.GetErrorDetail().GetMessage())),
	}
	if n := l.suppressed.Swap(0); n > 0 {
		attrs = append(attrs, slog.Int64("suppressed", n))
	}
	l.log.LogAttrs(ctx, slog.LevelWarn, "a client of SDS rejected what it was sent, and goes on with what it had", attrs...)
}

// complaint is a client's text as the log may have it.
func complaint(text string) string {
	if strings.Contains(text, "PRIVATE KEY") {
		return "left out, as it tells of a private key" // I10, whoever leaks it
	}
	return brief(text, maxNACK)
}

// brief is the beginning of a text from outside.
func brief(text string, most int) string {
	if len(text) > most {
		text = text[:most] + "..."
	}
	return strings.ToValidUTF8(text, "?")
}
