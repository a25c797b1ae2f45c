package istioca

import (
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	istiov1 "istio.io/api/security/v1alpha1"
)

const (
	// maxRequest holds the largest CSR that is looked at, and maxMetadata a few
	// texts.
	maxRequest  = 32 << 10
	maxMetadata = 4 << 10
	// maxDepth is how deep the metadata of a request may be nested: what is known
	// there is text.
	maxDepth = 8
)

// ServerOptions are for the server that the service is registered on. A request is
// decoded before anybody can look at its token, so what strangers can make of it
// is bounded.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.ForceServerCodecV2(shallow{encoding.GetCodecV2(grpcproto.Name)}),
	}
}

// shallow is gRPC's codec, and takes no deeply nested requests.
type shallow struct{ encoding.CodecV2 }

// Unmarshal implements encoding.CodecV2. What can't be decoded is a request without
// content, which is refused like others: gRPC itself would answer with a code that
// these clients repeat.
func (c shallow) Unmarshal(data mem.BufferSlice, v any) error {
	req, ok := v.(*istiov1.IstioCertificateRequest)
	if !ok {
		return fmt.Errorf("unmarshal: %T is no request of this service", v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	if besideCSR(buf.ReadOnlyData()) > maxMetadata || (proto.UnmarshalOptions{RecursionLimit: maxDepth}).Unmarshal(buf.ReadOnlyData(), req) != nil {
		proto.Reset(req)
	}
	return nil
}

// besideCSR is how many bytes of a request are not its CSR, which alone is cheap
// to decode at any length.
func besideCSR(request []byte) int {
	const csr = 1 // the field's number
	size := 0
	for len(request) > 0 {
		number, _, n := protowire.ConsumeField(request)
		if n < 0 {
			return len(request) + size // not for us to judge
		}
		if number != csr {
			size += n
		}
		request = request[n:]
	}
	return size
}
