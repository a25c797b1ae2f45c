package fault

import (
	"errors"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Domain is the ErrorInfo domain of every reason that Assay sends.
const Domain = "assay"

// The only table between kinds and gRPC codes, read in both directions.
var table = []struct {
	kind Kind
	code codes.Code
}{
	{Internal, codes.Internal},
	{Invalid, codes.InvalidArgument},
	{Unauthenticated, codes.Unauthenticated},
	{Denied, codes.PermissionDenied},
	{NotFound, codes.NotFound},
	{Exists, codes.AlreadyExists},
	{Conflict, codes.Aborted},
	{Exhausted, codes.ResourceExhausted},
	{NotReady, codes.Unavailable},
	{Precondition, codes.FailedPrecondition},
	{Unimplemented, codes.Unimplemented},
}

// Code returns the gRPC code for a kind.
func Code(k Kind) codes.Code {
	for _, row := range table {
		if row.kind == k {
			return row.code
		}
	}
	return codes.Internal
}

// kindOfCode reads a peer's code. Those that say that a call did not come to
// its end are NotReady, those that no kind has are Internal.
func kindOfCode(code codes.Code) Kind {
	switch code {
	case codes.DeadlineExceeded, codes.Canceled, codes.Unknown:
		return NotReady
	}
	for _, row := range table {
		if row.code == code {
			return row.kind
		}
	}
	return Internal
}

// FromItem reads the failure of one item of a batch back into a fault. Its
// code is Code's, as in a status. A reason that is no reason becomes the
// kind's name. The result is never nil: an item that failed with code OK is a
// defect of the peer, Internal.
func FromItem(code int32, reason, text string) error {
	kind := kindOfCode(codes.Code(code))
	if !IsReason(reason) {
		reason = kind.Error()
	}
	if text == "" {
		text = "the server gives no reason"
	}
	return New(kind, reason, text)
}

// IsReason says whether s can be a reason: a short snake_case code.
func IsReason(s string) bool {
	if s == "" || len(s) > 64 || s[0] == '_' {
		return false
	}
	return strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789_") == ""
}

// maxRetryAfter bounds what is believed of a peer that says when to come back.
const maxRetryAfter = time.Minute

// Status turns err into what a peer may see: kind, reason, safe text, when to
// retry and, if not empty, the request id. The cause stays behind.
func Status(err error, requestID string) *status.Status {
	if err == nil {
		return nil
	}
	reason := ReasonOf(err)
	msg := reason + ": " + SafeText(err)
	info := &errdetails.ErrorInfo{Reason: reason, Domain: Domain}
	if requestID != "" {
		msg += requestSuffix(requestID)
		info.Metadata = map[string]string{"request_id": requestID}
	}
	st := status.New(Code(KindOf(err)), msg)
	details := []protoadapt.MessageV1{info}
	if after := RetryAfterOf(err); after > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(after)})
	}
	if detailed, err := st.WithDetails(details...); err == nil {
		return detailed
	}
	return st
}

// requestSuffix is how a text for people names the request.
func requestSuffix(requestID string) string {
	if requestID == "" {
		return ""
	}
	return " (request_id=" + requestID + ")"
}

// FromStatus reads a gRPC error back into a fault. Errors that carry no gRPC
// status become NotReady: the peer could not be reached or went away.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*Fault](err); ok {
		return err
	}
	st, ok := status.FromError(err)
	if !ok {
		return Wrap(NotReady, err, "unavailable", "the peer can't be reached")
	}
	kind := kindOfCode(st.Code())
	f := &Fault{kind: kind, reason: kind.Error(), safe: st.Message()}
	for _, d := range st.Details() {
		switch info := d.(type) {
		case *errdetails.ErrorInfo:
			if info.GetDomain() == Domain {
				f.reason, f.requestID = info.GetReason(), info.GetMetadata()["request_id"]
				f.safe = strings.TrimPrefix(f.safe, f.reason+": ")
				f.safe = strings.TrimSuffix(f.safe, requestSuffix(f.requestID))
			}
		case *errdetails.RetryInfo:
			f.retryAfter = min(max(info.GetRetryDelay().AsDuration(), 0), maxRetryAfter)
		}
	}
	return f
}
