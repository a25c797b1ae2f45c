package endpoint

import (
	"sync"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/agent/cache"
)

// profile is one of the streams that a snapshot can be told as.
type profile struct {
	method string
	build  func(*cache.Snapshot) proto.Message
}

var (
	x509SVIDs   = &profile{method: "FetchX509SVID", build: x509SVIDResponse}
	x509Bundles = &profile{method: "FetchX509Bundles", build: x509BundlesResponse}
)

func x509SVIDResponse(snap *cache.Snapshot) proto.Message {
	resp := &workload.X509SVIDResponse{}
	for _, svid := range snap.SVIDs {
		resp.Svids = append(resp.Svids, &workload.X509SVID{
			SpiffeId: svid.ID.String(), X509Svid: svid.CertificatesDER, X509SvidKey: svid.Key.DER(),
			Bundle: snap.BundleDER, Hint: svid.Hint,
		})
	}
	return resp
}

// x509BundlesResponse has the own trust domain always (WL-49).
func x509BundlesResponse(snap *cache.Snapshot) proto.Message {
	return &workload.X509BundlesResponse{Bundles: map[string][]byte{snap.TrustDomain.IDString(): snap.BundleDER}}
}

// message is a response in the form that goes to the wire, shared by all streams
// that send it.
type message struct {
	data   []byte
	buffer mem.Buffer
}

// encoding of one snapshot in one profile, done by whoever asks first.
type memo struct {
	once sync.Once
	msg  *message
	err  error
}

// encode returns the message for a snapshot, checked and encoded once.
func (p *profile) encode(snap *cache.Snapshot) (*message, error) {
	kept, ok := snap.Memo.Load(p)
	if !ok {
		kept, _ = snap.Memo.LoadOrStore(p, &memo{})
	}
	m := kept.(*memo)
	m.once.Do(func() { m.msg, m.err = p.encodeOnce(snap) })
	return m.msg, m.err
}

func (p *profile) encodeOnce(snap *cache.Snapshot) (*message, error) {
	if err := checkSnapshot(snap); err != nil {
		return nil, err
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(p.build(snap))
	if err != nil {
		return nil, errInvalid(err)
	}
	if len(data) > maxMessage {
		return nil, errTooLarge(len(data))
	}
	return &message{data: data, buffer: mem.SliceBuffer(data)}, nil
}

// codec is gRPC's for protobuf, and passes messages through that are encoded
// already.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(grpcproto.Name)} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*message); ok {
		return mem.BufferSlice{m.buffer}, nil
	}
	return c.CodecV2.Marshal(v)
}
