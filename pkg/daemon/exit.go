package daemon

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"strings"
	"syscall"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Exit codes, as in sysexits.h.
const (
	exitOK          = 0
	exitUsage       = 64
	exitData        = 65 // corrupt or wrong data
	exitUnavailable = 69
	exitDefect      = 70
	exitCantCreate  = 73 // cannot create, or full
	exitIO          = 74
	exitTemporary   = 75 // conflict: try again
	exitNotAllowed  = 77
	exitConfig      = 78
)

// exitByReason comes before exitByKind. A reason that ends in _* stands for all
// that begin so.
var exitByReason = map[string]int{
	"usage":                exitUsage,
	"store_corrupt":        exitData,
	"store_newer":          exitData,
	"store_rollback":       exitData,
	"audit_corrupt":        exitData,
	"audit_chain_broken":   exitData,
	"restore_roots_moved":  exitData,
	"seal_key_exists":      exitCantCreate,
	"store_exists":         exitCantCreate,
	"file_exists":          exitCantCreate,
	"store_commit_unknown": exitIO,
	"audit_failed":         exitIO,
	"store_full":           exitCantCreate,
	"audit_full":           exitCantCreate,
	"disk_full":            exitCantCreate,
	"backup_no_space":      exitCantCreate,
	"path_untrusted":       exitNotAllowed,
	"selector_too_weak":    exitConfig,
	// A root that is not where the step could be made, or not yet.
	"would_break_live_svids": exitTemporary,
	"not_acknowledged":       exitTemporary,
	"rotation_in_progress":   exitTemporary,
	"abort_too_late":         exitTemporary,
	"authority_state":        exitTemporary,
	"no_rotation":            exitTemporary,
	"no_gate":                exitTemporary,
	"wait_timeout":           exitTemporary,
	"config_*":               exitConfig,
	"seal_key_*":             exitConfig,
}

var exitByKind = map[fault.Kind]int{
	fault.Invalid:         exitData,
	fault.Unauthenticated: exitNotAllowed,
	fault.Denied:          exitNotAllowed,
	fault.NotFound:        exitUnavailable,
	fault.NotReady:        exitUnavailable,
	fault.Unimplemented:   exitUnavailable,
	fault.Exists:          exitTemporary,
	fault.Conflict:        exitTemporary,
	fault.Exhausted:       exitTemporary,
	fault.Precondition:    exitConfig,
	fault.Internal:        exitDefect,
}

// exitByErrno is for errors of the system that nobody gave a kind.
var exitByErrno = []struct {
	err  error
	code int
}{
	{syscall.ENOSPC, exitCantCreate},
	{syscall.EDQUOT, exitCantCreate},
	{syscall.EIO, exitIO},
	{syscall.EROFS, exitIO},
	{fs.ErrPermission, exitNotAllowed},
	{syscall.EADDRNOTAVAIL, exitUnavailable},
}

// ExitCode returns the exit code of a program that ends with err: by its
// reason, else its kind, else the system's error behind it.
func ExitCode(err error) int {
	if err == nil {
		return exitOK
	}
	// An address that another process holds may be free the next moment, when
	// that is our own predecessor. Whatever the fault around it says, the code
	// must be one after which units start the program again.
	if errors.Is(err, syscall.EADDRINUSE) {
		return exitUnavailable
	}
	_, isFault := errors.AsType[*fault.Fault](err)
	_, isKind := errors.AsType[fault.Kind](err)
	if !isFault && !isKind {
		for _, row := range exitByErrno {
			if errors.Is(err, row.err) {
				return row.code
			}
		}
		return exitDefect
	}
	reason := fault.ReasonOf(err)
	if code, ok := exitByReason[reason]; ok {
		return code
	}
	for family, code := range exitByReason {
		if prefix, ok := strings.CutSuffix(family, "*"); ok && strings.HasPrefix(reason, prefix) {
			return code
		}
	}
	if code, ok := exitByKind[fault.KindOf(err)]; ok {
		return code
	}
	return exitDefect
}

// Failure is an error as people and scripts are told of it: Code is the kind
// ("not_found"), Reason the stable code to match on, Message one line for
// people, RequestID what to look for in the log of the daemon that answered;
// it is empty when none did.
type Failure struct {
	Code      string `json:"code"`
	Reason    string `json:"reason"`
	Message   string `json:"message"`
	RequestID string `json:"request_id"`
}

// Describe tells err with its cause: for whoever runs the program, not for a
// peer.
func Describe(err error) Failure {
	return Failure{Code: fault.KindOf(err).Error(), Reason: fault.ReasonOf(err), Message: oneLine(story(err)), RequestID: fault.RequestIDOf(err)}
}

// Fail writes err to w in one line, `error: <reason>: <text>`, or with format
// json as {"error":{...}}, and returns the exit code. w is
// the standard error of whoever runs the program.
func Fail(w io.Writer, format string, err error) int {
	if err == nil {
		return exitOK
	}
	f := Describe(err)
	line := "error: " + f.Reason + ": " + f.Message
	if f.RequestID != "" {
		line += " (request_id=" + f.RequestID + ")"
	}
	if format == "json" {
		if doc, jerr := json.Marshal(struct {
			Error Failure `json:"error"`
		}{f}); jerr == nil {
			line = string(doc)
		}
	}
	_, _ = io.WriteString(w, line+"\n") // with standard error gone nobody can be told
	return ExitCode(err)
}

// story is the text of a fault and of what was behind it at first, or the whole
// of another error. Faults in between say the same less closely.
func story(err error) string {
	f, ok := errors.AsType[*fault.Fault](err)
	if !ok {
		return err.Error()
	}
	text := fault.SafeText(f)
	for {
		behind := f.Unwrap() // the kind, then the cause
		if len(behind) < 2 {
			return text
		}
		if f, ok = errors.AsType[*fault.Fault](behind[1]); !ok {
			return text + ": " + behind[1].Error()
		}
	}
}

// usage is an error in the command line.
func usage(text string) error { return fault.New(fault.Invalid, "usage", text) }
