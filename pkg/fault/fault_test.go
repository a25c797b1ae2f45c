package fault_test

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func TestKindSurvivesWrapping(t *testing.T) {
	err := fmt.Errorf("load entry: %w", fault.Wrap(fault.NotFound, io.EOF, "entry_unknown", "no such entry"))
	if !errors.Is(err, fault.NotFound) || errors.Is(err, fault.Denied) {
		t.Fatalf("kind lost: %v", err)
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal("cause lost")
	}
	if fault.KindOf(err) != fault.NotFound || fault.ReasonOf(err) != "entry_unknown" {
		t.Fatalf("got %v %q", fault.KindOf(err), fault.ReasonOf(err))
	}
}

func TestStatusNeverCarriesTheCause(t *testing.T) {
	secret := errors.New("lookup db 10.0.0.3: token abc")
	for _, err := range []error{
		secret,
		fmt.Errorf("outer: %w", secret),
		fmt.Errorf("outer abc: %w", fault.Wrap(fault.Denied, secret, "not_allowed", "not allowed here")),
	} {
		st := fault.Status(err, "REQ1")
		if strings.Contains(st.Message(), "abc") || strings.Contains(fmt.Sprint(st.Details()...), "abc") {
			t.Errorf("%v leaks its cause: %v", err, st)
		}
		if !strings.Contains(st.Message(), "request_id=REQ1") {
			t.Errorf("no request id in %q", st.Message())
		}
	}
}

func TestStatusRoundTrip(t *testing.T) {
	for k := fault.Internal; k <= fault.Unimplemented; k++ {
		back := fault.FromStatus(fault.Status(fault.New(k, "some_reason", "some text"), "R").Err())
		if fault.KindOf(back) != k || fault.ReasonOf(back) != "some_reason" {
			t.Errorf("%v came back as %v %q", k, fault.KindOf(back), fault.ReasonOf(back))
		}
		if fault.SafeText(back) != "some text" || fault.RequestIDOf(back) != "R" {
			t.Errorf("text %q, request id %q", fault.SafeText(back), fault.RequestIDOf(back))
		}
	}
}

func TestRetryRoundTrip(t *testing.T) {
	for after, want := range map[time.Duration]time.Duration{
		0: 0, -time.Second: 0, 1500 * time.Millisecond: 1500 * time.Millisecond, 1000 * time.Hour: time.Minute,
	} {
		back := fault.FromStatus(fault.Status(fault.Later(fault.Exhausted, "limit_x", "less", after), "R").Err())
		if fault.RetryAfterOf(back) != want || fault.ReasonOf(back) != "limit_x" || fault.SafeText(back) != "less" {
			t.Errorf("%v came back as %v, %v", after, fault.RetryAfterOf(back), back)
		}
	}
	if fault.RetryAfterOf(io.EOF) != 0 || fault.RetryAfterOf(nil) != 0 {
		t.Error("others don't say")
	}
}

func TestFromStatusOfForeignErrors(t *testing.T) {
	cases := []struct {
		err  error
		want fault.Kind
	}{
		{io.EOF, fault.NotReady},
		{status.Error(codes.Canceled, "x"), fault.NotReady},
		{status.Error(codes.DeadlineExceeded, "x"), fault.NotReady},
		{status.Error(codes.DataLoss, "x"), fault.Internal},
		{status.Error(codes.PermissionDenied, "x"), fault.Denied},
	}
	for _, c := range cases {
		if got := fault.KindOf(fault.FromStatus(c.err)); got != c.want {
			t.Errorf("%v: got %v, want %v", c.err, got, c.want)
		}
	}
	if fault.FromStatus(nil) != nil || fault.Status(nil, "") != nil {
		t.Error("nil must stay nil")
	}
}

func TestItemRoundTrip(t *testing.T) {
	for k := fault.Internal; k <= fault.Unimplemented; k++ {
		back := fault.FromItem(int32(fault.Code(k)), "some_reason", "some text")
		if fault.KindOf(back) != k || fault.ReasonOf(back) != "some_reason" || fault.SafeText(back) != "some text" {
			t.Errorf("%v came back as %v", k, back)
		}
	}
}

// An item's code means what the same code of a whole call means.
func TestItemsAreReadAsStatuses(t *testing.T) {
	for code := codes.Canceled; code < 20; code++ {
		whole, item := fault.FromStatus(status.Error(code, "x")), fault.FromItem(int32(code), "", "x")
		if fault.KindOf(item) != fault.KindOf(whole) || fault.ReasonOf(item) != fault.ReasonOf(whole) || fault.SafeText(item) != "x" {
			t.Errorf("%v: item %v, status %v", code, item, whole)
		}
	}
	for _, code := range []int32{-1, 0, 1 << 30} {
		if err := fault.FromItem(code, "some_reason", ""); fault.KindOf(err) != fault.Internal || fault.SafeText(err) == "" {
			t.Errorf("%d: %v", code, err)
		}
	}
	for _, reason := range []string{"", "_x", "Not One", "a-b", "a\nb", strings.Repeat("x", 65)} {
		if err := fault.FromItem(int32(codes.NotFound), reason, "x"); fault.ReasonOf(err) != "not_found" {
			t.Errorf("%q: %v", reason, err)
		}
	}
}

func TestCauseOfIsTheReasonBehindTheReason(t *testing.T) {
	inner := fault.New(fault.Denied, "expired", "it has expired")
	outer := fmt.Errorf("attest: %w", fault.Wrap(fault.Denied, fmt.Errorf("check: %w", inner), "refused", "no"))
	for err, want := range map[error]string{nil: "", io.EOF: "", inner: "", outer: "expired", fault.Wrap(fault.Denied, io.EOF, "refused", "no"): ""} {
		if got := fault.CauseOf(err); got != want {
			t.Errorf("%v: %q, want %q", err, got, want)
		}
	}
}
