package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func TestExitCodes(t *testing.T) {
	path := func(errno error) error { return &fs.PathError{Op: "write", Path: "/x", Err: errno} }
	inUse := &net.OpError{Op: "listen", Err: os.NewSyscallError("bind", syscall.EADDRINUSE)}
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{usage("no such flag"), 64},
		// By reason, whatever the kind.
		{fault.New(fault.Precondition, "store_corrupt", ""), 65},
		{fault.New(fault.Precondition, "store_newer", ""), 65},
		{fault.New(fault.Precondition, "audit_corrupt", ""), 65},
		{fault.New(fault.NotReady, "store_commit_unknown", ""), 74},
		{fault.New(fault.NotReady, "audit_failed", ""), 74},
		{fault.New(fault.Exhausted, "store_full", ""), 73},
		{fault.New(fault.Exhausted, "audit_full", ""), 73},
		{fault.New(fault.Exhausted, "disk_full", ""), 73},
		{fault.New(fault.Precondition, "path_untrusted", ""), 77},
		{fault.New(fault.Invalid, "config_invalid", ""), 78},
		{fault.New(fault.NotFound, "config_missing", ""), 78},
		{fault.New(fault.NotFound, "seal_key_missing", ""), 78},
		{fault.New(fault.Exists, "seal_key_exists", ""), 73},
		// By kind.
		{fault.New(fault.Invalid, "x", ""), 65},
		{fault.New(fault.Unauthenticated, "x", ""), 77},
		{fault.New(fault.Denied, "x", ""), 77},
		{fault.New(fault.NotFound, "x", ""), 69},
		{fault.New(fault.Exists, "x", ""), 75},
		{fault.New(fault.Conflict, "x", ""), 75},
		{fault.New(fault.Exhausted, "x", ""), 75},
		{fault.New(fault.NotReady, "x", ""), 69},
		{fault.New(fault.Precondition, "x", ""), 78},
		{fault.New(fault.Unimplemented, "x", ""), 69},
		{fault.New(fault.Internal, "x", ""), 70},
		{fault.Denied, 77},
		{fault.New(fault.Kind(99), "x", ""), 70},
		// A fault keeps its code whatever is around it or behind it.
		{fmt.Errorf("open: %w", fault.Wrap(fault.NotReady, path(syscall.ENOSPC), "x", "")), 69},
		{errors.Join(errors.New("close"), fault.New(fault.Denied, "x", "")), 77},
		// By the system's error.
		{path(syscall.ENOSPC), 73},
		{path(syscall.EDQUOT), 73},
		{fmt.Errorf("w: %w", path(syscall.EIO)), 74},
		{path(syscall.EROFS), 74},
		{path(syscall.EACCES), 77},
		{inUse, 69},
		{errors.New("a defect"), 70},
		// A port in use, whatever is around it: units restart after 69.
		{fault.Wrap(fault.Precondition, inUse, "config_listen", ""), 69},
		{fmt.Errorf("run: %w", fault.Wrap(fault.Conflict, fmt.Errorf("bind: %w", inUse), "x", "")), 69},
		{errors.Join(errors.New("close"), inUse), 69},
	} {
		if got := ExitCode(c.err); got != c.want {
			t.Errorf("%v: got %d, want %d", c.err, got, c.want)
		}
	}
	for k := fault.Internal; k <= fault.Unimplemented; k++ {
		if _, ok := exitByKind[k]; !ok {
			t.Errorf("kind %v has no exit code", k)
		}
	}
}

func TestFailTellsReasonTextAndCauseInOneLine(t *testing.T) {
	cause := errors.New("disk\nsays \x1b[31mno")
	for _, c := range []struct {
		err  error
		want string
	}{
		{usage("unknown flag: --x"), "error: usage: unknown flag: --x\n"},
		{fault.New(fault.Denied, "not_allowed", "not allowed here"), "error: not_allowed: not allowed here\n"},
		{fmt.Errorf("open store: %w", fault.Wrap(fault.NotReady, cause, "store_locked", "stop the other one")), "error: store_locked: stop the other one: disk says [31mno\n"},
		{
			fault.Wrap(fault.Precondition, fmt.Errorf("open: %w", fault.Wrap(fault.Precondition, cause, "path_missing", "no file")), "seal_key_missing", "make one"),
			"error: seal_key_missing: make one: disk says [31mno\n",
		},
		{
			fault.Wrap(fault.Denied, fault.New(fault.Precondition, "inner", "inner text"), "outer", "outer text"),
			"error: outer: outer text\n",
		},
		{fmt.Errorf("read key: %w", cause), "error: internal: read key: disk says [31mno\n"},
	} {
		var out bytes.Buffer
		if code := Fail(&out, "text", c.err); code != ExitCode(c.err) || out.String() != c.want {
			t.Errorf("%d %q, want %q", code, out.String(), c.want)
		}
	}
	var out bytes.Buffer
	if code := Fail(&out, "text", nil); code != 0 || out.Len() != 0 {
		t.Errorf("%d %q for no error", code, out.String())
	}
}

func TestFailAsJSON(t *testing.T) {
	var out bytes.Buffer
	if code := Fail(&out, "json", fault.New(fault.Precondition, "config_invalid", `line 3: "x"`)); code != 78 {
		t.Errorf("code %d", code)
	}
	var doc map[string]map[string]string
	if err := json.Unmarshal(out.Bytes(), &doc); err != nil || strings.Count(out.String(), "\n") != 1 {
		t.Fatalf("%q: %v", out.String(), err)
	}
	want := map[string]string{"code": "precondition", "reason": "config_invalid", "message": `line 3: "x"`, "request_id": ""}
	if fmt.Sprint(doc["error"]) != fmt.Sprint(want) {
		t.Errorf("got %v", doc)
	}
}
