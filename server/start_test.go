package server

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

func TestReadinessFollowsTheListeners(t *testing.T) {
	cfg := newConfig(t)
	s, err := New(cfg, Deps{Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Ready(t.Context()); fault.KindOf(err) != fault.NotReady || s.Addr() != nil {
		t.Errorf("before Run: %v, %v", err, s.Addr())
	}
	if _, err := os.Stat(cfg.DataDir); err == nil {
		t.Error("New has made something")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	<-s.Started()
	if err := s.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := s.Ready(t.Context()); fault.KindOf(err) != fault.NotReady {
		t.Errorf("after Run: %v", err)
	}
}

// What keeps a server from starting is one clear line.
func TestStartFailsWithItsReason(t *testing.T) {
	run := func(cfg Config) error {
		s, err := New(cfg, Deps{Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		return s.Run(ctx)
	}
	want := func(what string, err error, reason string) {
		t.Helper()
		if fault.ReasonOf(err) != reason || strings.Contains(fault.SafeText(err), "\n") {
			t.Errorf("%s: %v, want %s", what, err, reason)
		}
	}
	cfg := newConfig(t)
	cfg.SealKeyFile += "x"
	want("no seal key", run(cfg), "seal_key_missing")

	cfg = newConfig(t)
	cfg.Bootstrap = ""
	want("empty store", run(cfg), "authority_missing")
	cfg.Bootstrap = "2020-01-01"
	want("bootstrap on another day", run(cfg), "bootstrap_not_today")

	h := start(t)
	locked := newConfig(t)
	locked.DataDir, locked.SealKeyFile = h.cfg.DataDir, h.cfg.SealKeyFile
	want("data directory in use", run(locked), "data_dir_locked")
	busy := newConfig(t)
	busy.Listen = h.server.Addr().String()
	want("port in use", run(busy), "config_listen")
	if _, err := os.Stat(filepath.Join(busy.DataDir, "store.db")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a port in use cost a root: %v", err)
	}
	busy = newConfig(t)
	busy.Admin.Socket = h.cfg.Admin.Socket
	want("socket in use", run(busy), "socket_in_use")

	h.stop()
	other := h.cfg
	other.SealKeyFile += ".other"
	if err := WriteSealKey(other.SealKeyFile); err != nil {
		t.Fatal(err)
	}
	if err := run(other); err == nil || strings.Contains(fault.SafeText(err), "\n") || fault.ReasonOf(err) == "internal" {
		t.Errorf("another seal key: %v", err)
	}
	if err := os.Chmod(h.cfg.SealKeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	want("seal key for all to read", run(h.cfg), "path_untrusted")
	if err := os.Chmod(h.cfg.SealKeyFile, 0o600); err != nil {
		t.Fatal(err)
	}
	wrong := h.cfg
	wrong.TrustDomain = "other.org"
	if err := run(wrong); fault.KindOf(err) != fault.Precondition {
		t.Errorf("another trust domain: %v", err)
	}
	if err := os.WriteFile(filepath.Join(h.cfg.DataDir, "store.db"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want("empty store file", run(h.cfg), "store_corrupt") // NEG-55: and no new root
}

func TestSealKeyBesideTheStoreIsWarnedAbout(t *testing.T) {
	h := start(t, func(c *Config) {
		if err := os.MkdirAll(c.DataDir, 0o700); err != nil {
			t.Fatal(err)
		}
		c.SealKeyFile = filepath.Join(c.DataDir, "seal.key")
		if err := WriteSealKey(c.SealKeyFile); err != nil {
			t.Fatal(err)
		}
	})
	status, err := h.operator().admin.Status(t.Context(), &adminv1.StatusRequest{})
	if err != nil || !strings.Contains(strings.Join(status.GetWarnings(), ""), "seal key") || !strings.Contains(h.logs.String(), "seal key") {
		t.Errorf("%v, %v", status.GetWarnings(), err)
	}
}
