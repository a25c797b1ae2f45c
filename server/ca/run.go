package ca

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/store"
)

// beatTimeout bounds one reading of the store.
const beatTimeout = 10 * time.Second

// Run keeps the authority current until ctx ends: it follows the store, reads
// it regularly whether it reports changes or not, and replaces the issuer in
// time. It returns an error when the records no longer verify (store_corrupt);
// signing has stopped for good then.
func (a *Authority) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, prefix := range []string{authorityPrefix, sequenceKey} {
		g.Go(func() error { return a.follow(ctx, prefix) })
	}
	g.Go(func() error { return a.keepTime(ctx) })
	err := g.Wait()
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}

// follow reads the store again after every commit that touches prefix.
func (a *Authority) follow(ctx context.Context, prefix string) error {
	var backoff schedule.Backoff
	for {
		err := a.watch(ctx, prefix, &backoff)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case fatal(err):
			return err
		case !errors.Is(err, store.ErrCompacted):
			a.log.LogAttrs(ctx, slog.LevelWarn, "watch of the store ended", slog.String("prefix", prefix), slog.Any("error", err))
		}
		if err := schedule.Sleep(ctx, backoff.Next()); err != nil {
			return err
		}
		// What happened since is in the records, whatever the history holds.
		if err := a.refresh(ctx); err != nil {
			return err
		}
	}
}

// watch returns when the watch ends or the records don't verify.
func (a *Authority) watch(ctx context.Context, prefix string, backoff *schedule.Backoff) error {
	from := a.current.Load().view.listed
	for batch, err := range a.store.Watch(ctx, prefix, from) {
		if err != nil {
			return err
		}
		backoff.Reset()
		a.log.LogAttrs(ctx, slog.LevelDebug, "authority records changed", slog.Int64("revision", batch.Revision))
		if err := a.refresh(ctx); err != nil {
			return err
		}
	}
	return errors.New("watch ended without an error")
}

// keepTime reads the store and looks after the issuer at every beat. It goes
// by the wall clock: a timer that a suspended machine has held up only means
// one late look.
func (a *Authority) keepTime(ctx context.Context) error {
	ticker := time.NewTicker(a.beat)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if err := a.refresh(ctx); err != nil {
			return err
		}
	}
}

// refresh reads the store. Only what can't mend itself is returned; the rest is
// logged, and counts as silence of the store if it lasts.
func (a *Authority) refresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, beatTimeout)
	defer cancel()
	if err := a.lock(ctx); err != nil {
		return nil // ctx has ended, or a slow commit holds the turn: next beat
	}
	defer a.unlock()
	err := a.reloadLocked(ctx)
	if fatal(err) {
		return err
	}
	if err != nil && !errors.Is(ctx.Err(), context.Canceled) {
		a.log.LogAttrs(ctx, slog.LevelWarn, "refresh of the authority failed", slog.Any("error", err))
	}
	return nil
}

// fatal says whether err is about the records themselves and not about
// reaching them.
func fatal(err error) bool {
	switch fault.ReasonOf(err) {
	case "store_corrupt", "store_newer", "trust_domain_mismatch":
		return true
	}
	return false
}

// reloadLocked reads the store and puts what it holds, with an issuer that
// fits it, in place of what is known. Records that don't verify end signing.
// The caller has the turn.
func (a *Authority) reloadLocked(ctx context.Context) error {
	asked := time.Now()
	known := a.current.Load()
	found, err := a.load(ctx)
	if err == nil {
		err = checkForward(known.view, found)
	}
	if err != nil {
		return a.stopOn(err)
	}
	a.hear(asked)
	next := &current{view: found, bundle: known.bundle, issuer: known.issuer}
	if found.sequence != known.view.sequence {
		next.bundle = found.bundle(a.td)
	}
	if next.issuer != nil && next.issuer.rootID != found.active.record.ID {
		next.issuer = nil // a retired root signs nothing, nor does what hangs on it
	}
	if a.issuerDue(next.issuer, asked) {
		var made *issuer
		if made, err = a.makeIssuer(ctx, found.active); err == nil {
			next.issuer = made
		}
	}
	a.current.Store(next)
	if next.bundle != known.bundle {
		close(known.bundle.replaced)
		a.log.LogAttrs(ctx, slog.LevelInfo, "bundle replaced",
			slog.Uint64("sequence", next.bundle.Sequence), slog.String("active", found.active.record.ID))
	}
	return a.stopOn(err)
}

// stopOn ends signing for good if err says that the records are not what they
// should be, and returns err.
func (a *Authority) stopOn(err error) error {
	if fatal(err) {
		a.stopped.Store(&err)
	}
	return err
}
