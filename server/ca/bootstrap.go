package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// bootstrapGrace lets a bootstrap begun before midnight end after it.
const bootstrapGrace = time.Hour

// mayBootstrap says whether a first root may be made at now. An empty store on
// any other day is a lost one: making a root then would hide the loss and cut
// every workload off.
func mayBootstrap(bootstrap string, now time.Time) error {
	today := now.UTC().Format(time.DateOnly)
	if bootstrap == "" {
		return fault.Newf(fault.Precondition, "authority_missing",
			"the store holds no authority: if it should, restore it; to make the first root of a new trust domain set bootstrap: %s (today, UTC)", today)
	}
	day, err := time.Parse(time.DateOnly, bootstrap)
	if err != nil {
		return fault.Newf(fault.Precondition, "config_bootstrap", "bootstrap %q is not a date: write it as %s", bootstrap, today)
	}
	if now.Before(day) || !now.Before(day.AddDate(0, 0, 1).Add(bootstrapGrace)) {
		return fault.Newf(fault.Precondition, "bootstrap_not_today",
			"the store holds no authority and bootstrap names %s, not today: if it held one, restore it; to make the first root of a new trust domain set bootstrap: %s (today, UTC)", bootstrap, today)
	}
	return nil
}

// makeFirstRoot makes the first root: key, audit line, certificate, and one commit
// that holds only in a store without authorities. The root is durable and in
// the bundle before an issuer is made under it (I4).
func (a *Authority) makeFirstRoot(ctx context.Context) error {
	root, err := a.makeRoot(ctx, Active)
	if err != nil {
		return err
	}
	root.record.Marks.begin(a.ahead(time.Now()))
	root.record.Published = 1
	key := rootPrefix + root.record.ID
	value, err := a.stamp.seal(key, root.record)
	if err != nil {
		return err
	}
	sequence, err := a.stamp.seal(sequenceKey, nextSequence(0, []*authority{root}))
	if err != nil {
		return err
	}
	_, err = a.store.Commit(ctx,
		[]store.Precondition{{Key: key}, {Key: sequenceKey}},
		[]store.Write{{Key: key, Value: value}, {Key: sequenceKey, Value: sequence}})
	switch {
	case errors.Is(err, fault.Conflict):
		// Another server was faster. Our root was never seen by anybody.
		return a.keys.Destroy(ctx, root.record.KeyRef)
	case err != nil:
		// It may not be known whether the commit was made: the key lives on.
		return fmt.Errorf("store the first root: %w", err)
	}
	a.log.LogAttrs(ctx, slog.LevelWarn, "first root made",
		slog.String("authority_id", root.record.ID), slog.String("pin", Pin(root.cert)), slog.Time("not_after", root.cert.NotAfter))
	return nil
}
