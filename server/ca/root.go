package ca

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"time"

	"github.com/seed-caa81108/assay/server/keys"
)

// makeRoot makes a key and a self-signed certificate for it, in the given
// state. The root exists once its record is committed; until then the caller
// answers for the key.
func (a *Authority) makeRoot(ctx context.Context, state State) (*authority, error) {
	key, ref, err := a.keys.Create(ctx, keys.ECP256)
	if err != nil {
		return nil, fmt.Errorf("make root key: %w", err)
	}
	one, err := a.certifyRoot(ctx, key)
	if err != nil {
		return nil, errors.Join(err, a.keys.Destroy(ctx, ref))
	}
	one.record.State, one.record.KeyRef = state, ref
	return one, nil
}

func (a *Authority) certifyRoot(ctx context.Context, key crypto.Signer) (*authority, error) {
	now := time.Now().UTC().Truncate(time.Second)
	id, err := keys.ID(key.Public())
	if err != nil {
		return nil, err
	}
	number, err := a.serials.next()
	if err != nil {
		return nil, err
	}
	p := a.profiles.root
	template, err := p.authorityTemplate(number, key.Public(), now.Add(-p.backdate), now.Add(p.ttl))
	if err != nil {
		return nil, err
	}
	if err := a.auditAuthority(ctx, "root.create", id, template, id); err != nil {
		return nil, err
	}
	cert, err := p.signAuthority(template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &authority{
		cert:   cert,
		record: authorityRecord{ID: id, Certificate: cert.Raw, CreatedAt: now},
	}, nil
}
