package attest

import (
	"context"
	"errors"
	"io/fs"
	"os/user"
	"strconv"
	"sync"
	"time"

	"github.com/seed-caa81108/assay/pkg/selector"
)

// Unix gives the selectors that every Unix process has. Their names are the
// ones that SPIRE's unix attestor uses, so that entries move over unchanged:
// uid, gid, user, group, supplementary_gid, supplementary_group, and on demand
// path and sha256.
type Unix struct {
	config        UnixConfig
	users, groups names
	digests       *digests
}

// NewUnix returns the source of unix selectors.
func NewUnix(cfg UnixConfig) *Unix {
	return &Unix{
		config:  cfg,
		digests: newDigests(cfg.WorkloadSizeLimit),
		users: names{lookup: func(number string) (string, error) {
			u, err := user.LookupId(number)
			if err != nil {
				return "", err
			}
			return u.Username, nil
		}},
		groups: names{lookup: func(number string) (string, error) {
			g, err := user.LookupGroupId(number)
			if err != nil {
				return "", err
			}
			return g.Name, nil
		}},
	}
}

// Selectors implements Source. A number without a name gives no name selector.
func (u *Unix) Selectors(ctx context.Context, p Process) (selector.Set, error) {
	var b setBuilder
	b.number("uid", p.UID)
	b.number("gid", p.GID)
	b.name("user", &u.users, p.UID)
	b.name("group", &u.groups, p.GID)
	for _, g := range p.Groups {
		b.number("supplementary_gid", g)
		b.name("supplementary_group", &u.groups, g)
	}
	if err := errors.Join(b.err, u.program(ctx, &b, p)); err != nil {
		return nil, err
	}
	return selector.NewSet(b.list...), nil
}

type setBuilder struct {
	list []selector.Selector
	err  error
}

func (b *setBuilder) number(key string, n uint32) {
	b.list = append(b.list, selector.Selector{Type: "unix", Value: key + ":" + strconv.FormatUint(uint64(n), 10)})
}

func (b *setBuilder) name(key string, from *names, n uint32) {
	name, err := from.of(n, time.Now())
	if err != nil {
		b.err = err
		return
	}
	b.text(key, name)
}

// text adds a selector unless there is nothing to say or it can't be written.
func (b *setBuilder) text(key, value string) {
	s := selector.Selector{Type: "unix", Value: key + ":" + value}
	if value != "" && s.Check() == nil {
		b.list = append(b.list, s)
	}
}

// Names are kept for a short time: reading /etc/passwd, or asking a directory
// service, for each connection would be most of its cost.
const (
	nameTTL  = 30 * time.Second
	maxNames = 4096
)

// names is a small cache from number to name. The zero name stands for none.
type names struct {
	lookup func(number string) (string, error)
	mu     sync.Mutex
	known  map[uint32]knownName
}

type knownName struct {
	name  string
	until time.Time
}

func (c *names) of(n uint32, now time.Time) (string, error) {
	c.mu.Lock()
	k, ok := c.known[n]
	c.mu.Unlock()
	if ok && now.Before(k.until) {
		return k.name, nil
	}
	name, err := c.lookup(strconv.FormatUint(uint64(n), 10))
	if err != nil && !unnamed(err) {
		return "", err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil || len(c.known) >= maxNames {
		c.known = map[uint32]knownName{}
	}
	c.known[n] = knownName{name, now.Add(nameTTL)}
	return name, nil
}

// unnamed tells "there is no such name" from "it could not be looked up".
func unnamed(err error) bool {
	if _, ok := errors.AsType[user.UnknownUserIdError](err); ok {
		return true
	}
	if _, ok := errors.AsType[user.UnknownGroupIdError](err); ok {
		return true
	}
	return errors.Is(err, fs.ErrNotExist) // no file of names at all
}
