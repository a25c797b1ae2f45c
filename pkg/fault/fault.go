// Package fault is the one error type that crosses rooms and wires.
//
// A fault has a kind (what the caller can do about it), a reason (a stable
// snake_case code that scripts match on) and a safe text (one line that may be
// shown to the peer). Its cause stays on this side: it is logged, never sent.
// Only this package knows which kind is which gRPC code.
package fault

import (
	"errors"
	"fmt"
	"time"
)

// Kind says what sort of failure an error is. Kinds are errors themselves, so
// errors.Is(err, fault.Denied) works through wrapping.
type Kind int

// The kinds, each with what its receiver should do.
const (
	Internal        Kind = iota + 1 // a defect: report it
	Invalid                         // the request is wrong: change it
	Unauthenticated                 // the caller is unknown: prove who you are
	Denied                          // the caller is known and may not
	NotFound                        // the thing named does not exist
	Exists                          // the thing to be made exists already
	Conflict                        // somebody else was faster: read again, retry
	Exhausted                       // a limit is reached: less, or later
	NotReady                        // can't be done now: retry
	Precondition                    // the system's state forbids it: change that first
	Unimplemented                   // this program doesn't do that
)

var kindNames = map[Kind]string{
	Internal: "internal", Invalid: "invalid", Unauthenticated: "unauthenticated", Denied: "denied",
	NotFound: "not_found", Exists: "exists", Conflict: "conflict", Exhausted: "exhausted",
	NotReady: "not_ready", Precondition: "precondition", Unimplemented: "unimplemented",
}

// Error returns the kind's name, such as "not_found".
func (k Kind) Error() string {
	if name, ok := kindNames[k]; ok {
		return name
	}
	return fmt.Sprintf("kind_%d", int(k))
}

// Fault is an error with a kind, a reason and a text that is safe to show.
type Fault struct {
	kind   Kind
	reason string
	safe   string
	cause  error
	// requestID is what the peer that sent this fault knows the request by.
	requestID string
	// retryAfter is when it makes sense to try again; zero: not known.
	retryAfter time.Duration
}

// New returns a fault. The reason is a stable snake_case code, the safe text
// one line without secrets that says what is wrong and what to do next.
func New(kind Kind, reason, safe string) error {
	return &Fault{kind: kind, reason: reason, safe: safe}
}

// Newf is New with a formatted safe text.
func Newf(kind Kind, reason, format string, args ...any) error {
	return &Fault{kind: kind, reason: reason, safe: fmt.Sprintf(format, args...)}
}

// Wrap returns a fault whose cause is logged here and never sent.
func Wrap(kind Kind, cause error, reason, safe string) error {
	return &Fault{kind: kind, reason: reason, safe: safe, cause: cause}
}

// Later is New for what is refused only for now: it tells the peer how long to
// wait before it tries again.
func Later(kind Kind, reason, safe string, after time.Duration) error {
	return &Fault{kind: kind, reason: reason, safe: safe, retryAfter: max(after, 0)}
}

// Error returns the whole story, cause included: for logs on this side only.
func (f *Fault) Error() string {
	if f.cause != nil {
		return f.reason + ": " + f.safe + ": " + f.cause.Error()
	}
	return f.reason + ": " + f.safe
}

// Unwrap makes errors.Is find both the kind and the cause.
func (f *Fault) Unwrap() []error {
	if f.cause == nil {
		return []error{f.kind}
	}
	return []error{f.kind, f.cause}
}

// KindOf returns the kind of the outermost fault in err's chain, Internal if
// there is none. KindOf(nil) is zero.
func KindOf(err error) Kind {
	if err == nil {
		return 0
	}
	if f, ok := errors.AsType[*Fault](err); ok {
		return f.kind
	}
	if k, ok := errors.AsType[Kind](err); ok {
		return k
	}
	return Internal
}

// ReasonOf returns the reason code of the outermost fault in err's chain, or
// "internal".
func ReasonOf(err error) string {
	if f, ok := errors.AsType[*Fault](err); ok {
		return f.reason
	}
	return Internal.Error()
}

// CauseOf returns the reason of the fault that a fault wraps: what is the true
// reason where the peer is told another one. It is empty if there is none.
func CauseOf(err error) string {
	f, ok := errors.AsType[*Fault](err)
	if !ok {
		return ""
	}
	if cause, ok := errors.AsType[*Fault](f.cause); ok {
		return cause.reason
	}
	return ""
}

// RequestIDOf returns the id under which the peer that answered with err has
// logged the request, or nothing.
func RequestIDOf(err error) string {
	if f, ok := errors.AsType[*Fault](err); ok {
		return f.requestID
	}
	return ""
}

// RetryAfterOf returns how long to wait before trying again, zero if err does not
// say so.
func RetryAfterOf(err error) time.Duration {
	if f, ok := errors.AsType[*Fault](err); ok {
		return f.retryAfter
	}
	return 0
}

// SafeText returns what may be shown to a peer, without the reason.
func SafeText(err error) string {
	if f, ok := errors.AsType[*Fault](err); ok {
		return f.safe
	}
	return "internal error; the log of this process has the cause"
}
