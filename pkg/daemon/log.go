package daemon

import (
	"io"
	"log/slog"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// NewLogger returns the log of a process. Level is debug, info, warn or error,
// format text or json; empty means info and text.
func NewLogger(w io.Writer, level, format string) (*slog.Logger, error) {
	levels := map[string]slog.Level{"": slog.LevelInfo, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
	at, ok := levels[level]
	if !ok {
		return nil, fault.Newf(fault.Precondition, "config_invalid", "log.level %q is unknown: set debug, info, warn or error", clip(level))
	}
	opts := &slog.HandlerOptions{Level: at}
	switch format {
	case "", "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, fault.Newf(fault.Precondition, "config_invalid", "log.format %q is unknown: set text or json", clip(format))
}
