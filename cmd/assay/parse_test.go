package main

import (
	"context"
	"errors"
	"math"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// leaveDeadSocket leaves a socket file that nobody listens on.
func leaveDeadSocket(t *testing.T, path string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
}

// WL-17, CLIENT-1: where the Workload API may be said to be.
func TestEndpointAddressesAreThoseOfTheStandard(t *testing.T) {
	good := map[string]string{
		"unix:///run/a.sock":     "/run/a.sock",
		"unix:/run/a.sock":       "/run/a.sock",
		"UNIX:///run/a.sock":     "/run/a.sock",
		"unix:///run/with%20gap": "/run/with gap",
		"tcp://127.0.0.1:8000":   "127.0.0.1:8000",
		"tcp://[::1]:8000":       "[::1]:8000",
	}
	for uri, want := range good {
		e, err := parseEndpoint(uri)
		if err != nil || e.address != want {
			t.Errorf("%s: %q, %v", uri, e.address, err)
		}
	}
	for _, uri := range []string{
		"/run/a.sock", "unix:run/a.sock", "unix:@abstract", "unix-abstract:a", "unix://", "unix://host/run/a.sock", "unix://rel",
		"unix:///run/a.sock?x", "unix:///run/a.sock#x", "unix://u@/run/a.sock", "tcp://localhost:80", "tcp://127.0.0.1", "tcp://127.0.0.1:80/",
		"http://127.0.0.1:80", "unix:///run/%00", "", " ",
	} {
		if e, err := parseEndpoint(uri); err == nil {
			t.Errorf("%q was taken for %+v", uri, e)
		}
	}
}

func FuzzParseEndpoint(f *testing.F) {
	for _, s := range []string{"unix:///run/a.sock", "tcp://127.0.0.1:80", "unix:/a%2fb", "unix://h/p", "tcp://[::1%25lo]:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, uri string) {
		e, err := parseEndpoint(uri)
		if err != nil {
			return
		}
		// What we take, the client library can dial.
		if err := workloadapi.ValidateAddress(uri); err != nil {
			t.Fatalf("%q: go-spiffe refuses it: %v", uri, err)
		}
		if e.network == "unix" && e.address[0] != '/' {
			t.Fatalf("%q: relative path %q", uri, e.address)
		}
	})
}

func TestServerSocketForms(t *testing.T) {
	for in, want := range map[string]string{
		"": defaultServerSocket, "/a/b.sock": "/a/b.sock", "unix:///a/b.sock": "/a/b.sock", "unix:/a/b.sock": "/a/b.sock",
	} {
		if got, err := serverSocket(in, ""); err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
		if got, err := serverSocket("", in); err != nil || got != want {
			t.Errorf("%q in the environment: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"a.sock", "unix://a.sock", "tcp://127.0.0.1:1", "unix:", "/a\x00b"} {
		if got, err := serverSocket(in, ""); err == nil {
			t.Errorf("%q was taken for %q", in, got)
		}
	}
}

func TestSplitCommand(t *testing.T) {
	good := map[string][]string{
		"":                          nil,
		"  ":                        nil,
		"nginx -s reload":           {"nginx", "-s", "reload"},
		"sh -c 'a && b'":            {"sh", "-c", "a && b"},
		`sh -c "echo \"hi\" \\ \n"`: {"sh", "-c", `echo "hi" \ \n`},
		`a\ b c`:                    {"a b", "c"},
		`a '' b`:                    {"a", "", "b"},
		`a'b'"c"d`:                  {"abcd"},
		"a\tb\nc":                   {"a", "b", "c"},
		"echo $HOME *":              {"echo", "$HOME", "*"},
	}
	for line, want := range good {
		if got, err := splitCommand(line); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v", line, got, err)
		}
	}
	for _, line := range []string{"a 'b", `a "b`, `a \`, "'' a", `""`} {
		if got, err := splitCommand(line); err == nil {
			t.Errorf("%q was split to %q", line, got)
		}
	}
}

func FuzzSplitCommand(f *testing.F) {
	for _, s := range []string{"a b", `sh -c "x \" y"`, `a\ b`, "'", "''"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		words, err := splitCommand(line)
		if err != nil {
			return
		}
		// Quoting the words again gives the same words.
		var quoted []string
		for _, w := range words {
			quoted = append(quoted, "'"+strings.ReplaceAll(w, "'", `'\''`)+"'")
		}
		again, err := splitCommand(strings.Join(quoted, " "))
		if err != nil || !slices.Equal(again, words) {
			t.Fatalf("%q: %q, again %q, %v", line, words, again, err)
		}
	})
}

func TestItemErrorsKeepTheirReason(t *testing.T) {
	cases := []struct {
		status       *types.Status
		kind         error
		reason, text string
	}{
		{&types.Status{Code: int32(codes.AlreadyExists), Message: "entry_exists: there is one"}, fault.Exists, "entry_exists", "there is one"},
		{&types.Status{Code: int32(codes.InvalidArgument), Message: "failed to convert: bad"}, fault.Invalid, "invalid", "failed to convert: bad"},
		{&types.Status{Code: int32(codes.NotFound)}, fault.NotFound, "not_found", "the server gives no reason"},
		{&types.Status{Code: 99, Message: "x: y"}, fault.Internal, "x", "y"},
		{&types.Status{Code: int32(codes.Internal), Message: ": y"}, fault.Internal, "internal", ": y"},
	}
	for _, c := range cases {
		err := itemError(c.status)
		if !errors.Is(err, c.kind) || fault.ReasonOf(err) != c.reason || fault.SafeText(err) != c.text {
			t.Errorf("%v: %v %q %q", c.status, fault.KindOf(err), fault.ReasonOf(err), fault.SafeText(err))
		}
	}
	if err := itemError(&types.Status{Message: "OK"}); err != nil {
		t.Error(err)
	}
	if err := itemError(nil); err != nil {
		t.Error(err)
	}
}

func FuzzItemError(f *testing.F) {
	f.Add(int32(6), "entry_exists: there is one")
	f.Add(int32(-1), "")
	f.Fuzz(func(t *testing.T, code int32, text string) {
		err := itemError(&types.Status{Code: code, Message: text})
		if (err == nil) != (code == 0) {
			t.Fatalf("%d %q: %v", code, text, err)
		}
		if err == nil {
			return
		}
		if r := fault.ReasonOf(err); !fault.IsReason(r) {
			t.Fatalf("reason %q", r)
		}
		if line := oneLine(fault.SafeText(err)); strings.ContainsAny(line, "\n\x1b") {
			t.Fatalf("line %q", line)
		}
	})
}

func TestSpansReadWell(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 59 * time.Second: "59s", 90 * time.Second: "1m30s", 3*time.Hour + 5*time.Minute: "3h5m",
		25 * time.Hour: "1d1h", 400 * 24 * time.Hour: "400d", -90 * time.Second: "-1m30s", math.MaxInt64: "106751d",
	} {
		if got := span(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}

func TestPagesEndsOnAServerThatRepeatsItself(t *testing.T) {
	calls := 0
	err := pages(func(string) (string, error) {
		calls++
		return "same", nil
	})
	if !errors.Is(err, fault.Internal) || calls != 2 {
		t.Errorf("%d calls, %v", calls, err)
	}
}

func TestInterruptedCallSaysSo(t *testing.T) {
	f := populated(newPKI(t))
	path := f.start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out strings.Builder
	code := run(ctx, env{stdout: &out, stderr: &out, stdin: strings.NewReader(""), getenv: func(string) string { return "" }}, []string{"status", "--socket", path})
	if code == 0 || !strings.HasPrefix(out.String(), "error: interrupted: ") {
		t.Errorf("exit %d, %q", code, out.String())
	}
}
