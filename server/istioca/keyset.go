package istioca

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
)

const (
	maxKeySet  = 1 << 20 // bytes
	maxKeys    = 100
	minRSABits = 2048
	maxRSABits = 8192
	// keysEvery is how often the keys are asked for, keysAtMost how soon again
	// whatever happens, and keysLast how long they are used after the last answer.
	keysEvery    = 5 * time.Minute
	keysAtMost   = 30 * time.Second
	keysLast     = time.Hour
	fetchTimeout = 5 * time.Second
)

// keySet has the keys by which a cluster signs tokens. There are none but those
// that its source has answered with, and none once that was too long ago: a
// source that can't be reached never makes a token good.
type keySet struct {
	// source answers with the keys; nil: they are of a file, and stay.
	source func(context.Context) (map[string]any, error)

	fetching sync.Mutex // held by who asks

	mu      sync.Mutex
	keys    map[string]any // public keys by kid
	asked   time.Time      // when last
	answers time.Time      // when the last good one came
}

func newKeySet(key string, cfg OIDCConfig) (*keySet, error) {
	if cfg.JWKSFile != "" {
		data, err := durable.ReadTrusted(cfg.JWKSFile, maxKeySet)
		if err != nil {
			return nil, fmt.Errorf("read %s.jwks_file: %w", key, err)
		}
		keys, err := parseKeys(data)
		if err != nil {
			return nil, fault.Wrap(fault.Precondition, err, "config_istio", key+".jwks_file: "+cfg.JWKSFile+" has no JSON Web Key Set that can be used")
		}
		return &keySet{keys: keys}, nil
	}
	trust := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CAFile != "" {
		data, err := durable.ReadTrusted(cfg.CAFile, maxKeySet)
		if err != nil {
			return nil, fmt.Errorf("read %s.ca_file: %w", key, err)
		}
		trust.RootCAs = x509.NewCertPool()
		if !trust.RootCAs.AppendCertsFromPEM(data) {
			return nil, fault.New(fault.Precondition, "config_istio", key+".ca_file: "+cfg.CAFile+" has no PEM certificate")
		}
	}
	client := &http.Client{
		Transport: &http.Transport{TLSClientConfig: trust, ForceAttemptHTTP2: true, MaxIdleConns: 1, IdleConnTimeout: time.Minute},
		Timeout:   fetchTimeout,
		// Where it points is not who was asked.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return &keySet{source: func(ctx context.Context) (map[string]any, error) { return ask(ctx, client, cfg.JWKSURL) }}, nil
}

// run keeps the keys current until ctx ends.
func (k *keySet) run(ctx context.Context, tell func(error)) {
	for k.source != nil {
		err := k.fetch(ctx)
		if ctx.Err() != nil {
			return
		}
		pause := keysEvery
		if err != nil {
			pause = keysAtMost
		}
		if !errors.Is(err, errAsked) { // else somebody has been told
			tell(err)
		}
		if schedule.Sleep(ctx, pause) != nil {
			return
		}
	}
}

// find returns the key of this name. If it is not known its source is asked, as it
// may be new.
func (k *keySet) find(ctx context.Context, kid string) (any, error) {
	if key, known, usable := k.current(kid, time.Now()); known && usable {
		return key, nil
	}
	err := k.fetch(ctx)
	key, known, usable := k.current(kid, time.Now())
	switch {
	case known && usable:
		return key, nil
	case usable && err == nil:
		return nil, refused("token_invalid", "the token names a key that its cluster does not publish")
	}
	return nil, fault.Wrap(fault.NotReady, err, "jwks_stale", "the keys of the token's cluster can't be had at present: retry")
}

// current looks a key up, and says whether what is known may still be used.
func (k *keySet) current(kid string, now time.Time) (key any, known, usable bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	key, known = k.keys[kid]
	return key, known, k.source == nil || !k.answers.IsZero() && now.Sub(k.answers) <= keysLast
}

// errAsked says that the source was asked a moment ago. What it did not have then
// it may have now.
var errAsked = errors.New("the keys were asked for less than half a minute ago")

// fetch asks the source, unless that was done just now.
func (k *keySet) fetch(ctx context.Context) error {
	if k.source == nil {
		return nil
	}
	k.fetching.Lock()
	defer k.fetching.Unlock()
	now := time.Now()
	k.mu.Lock()
	recent := !k.asked.IsZero() && now.Sub(k.asked) < keysAtMost
	if !recent {
		k.asked = now
	}
	k.mu.Unlock()
	if recent {
		return errAsked
	}
	keys, err := k.source(context.WithoutCancel(ctx))
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys, k.answers = keys, time.Now()
	return nil
}

// ask fetches a key set.
func ask(ctx context.Context, client *http.Client, url string) (map[string]any, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, fmt.Errorf("ask for keys: %w", err)
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask for keys: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask for keys: the answer is %s", resp.Status)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxKeySet+1))
	if err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	return parseKeys(data)
}

// parseKeys takes the keys out of a JSON Web Key Set (RFC 7517 section 5) that
// sign. Others in it are left out; a set without any is none.
func parseKeys(data []byte) (map[string]any, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	switch err := json.Unmarshal(data, &set); {
	case len(data) > maxKeySet:
		return nil, errors.New("the key set is too large")
	case err != nil:
		return nil, fmt.Errorf("read key set: %w", err)
	case len(set.Keys) > maxKeys:
		return nil, fmt.Errorf("the key set has %d keys, at most %d are taken", len(set.Keys), maxKeys)
	}
	keys := map[string]any{}
	for _, raw := range set.Keys {
		var one jose.JSONWebKey
		if one.UnmarshalJSON(raw) != nil || one.KeyID == "" || one.Use != "" && one.Use != "sig" || !one.IsPublic() || !strong(one.Key) {
			continue
		}
		if _, twice := keys[one.KeyID]; twice {
			return nil, errors.New("the key set has two keys of one name")
		}
		keys[one.KeyID] = one.Key
	}
	if len(keys) == 0 {
		return nil, errors.New("the key set has no key that signs")
	}
	return keys, nil
}

func strong(key any) bool {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return true
	case *rsa.PublicKey:
		return k.N.BitLen() >= minRSABits && k.N.BitLen() <= maxRSABits
	}
	return false
}
