package ca

import (
	"fmt"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Config is the `ca` part of the server's configuration: how long things live.
type Config struct {
	// X509SVIDTTL is the life of a workload's X.509-SVID whose entry names
	// none, and of the server's own certificate. Default 1h.
	X509SVIDTTL time.Duration `yaml:"x509_svid_ttl"`
	// MaxX509SVIDTTL is the longest life of any such certificate, whatever an
	// entry or a request says. Default 1h.
	MaxX509SVIDTTL time.Duration `yaml:"max_x509_svid_ttl"`
	// RootTTL is the life of a root. Default 8760h, a year.
	RootTTL time.Duration `yaml:"root_ttl"`
	// IssuerTTL is the life of a server's own intermediate. It is replaced
	// when the longest SVID would no longer fit. Default 24h.
	IssuerTTL time.Duration `yaml:"issuer_ttl"`
	// Backdate is how far before its signing a certificate's life begins, for
	// peers whose clocks are behind. Default 2m, or a quarter of
	// x509_svid_ttl if that is less.
	Backdate time.Duration `yaml:"backdate"`
	// AutoRotate replaces the root by itself when a third of its life remains,
	// as `assay root rotate` does: it waits for every agent and forces nothing.
	// false leaves that to operators. Default true.
	AutoRotate *bool `yaml:"auto_rotate"`
}

const (
	// headroom is kept between the longest SVID and the end of whatever stands
	// above it: marks are raised that far ahead, issuers replaced that early.
	headroom = 10 * time.Minute
	// rootBackdate is for peers whose clocks are behind when a root is new.
	rootBackdate = time.Hour
	// minTTL leaves room to renew a certificate whose times are whole seconds.
	minTTL = 5 * time.Second
	// maxRootTTL keeps a typing error from making a root that nobody lives to
	// see the end of.
	maxRootTTL = 25 * 365 * 24 * time.Hour
)

// WithDefaults returns c with its zero fields set.
func (c Config) WithDefaults() Config {
	set := func(d *time.Duration, to time.Duration) {
		if *d == 0 {
			*d = to
		}
	}
	set(&c.X509SVIDTTL, time.Hour)
	set(&c.MaxX509SVIDTTL, time.Hour)
	set(&c.RootTTL, 365*24*time.Hour)
	set(&c.IssuerTTL, 24*time.Hour)
	set(&c.Backdate, min(2*time.Minute, c.X509SVIDTTL/4))
	if c.AutoRotate == nil {
		c.AutoRotate = new(true)
	}
	return c
}

// Check says whether the lives fit into each other, with an agent's own SVID
// living agentTTL: each at least twice as long as what it signs, so that one
// missed renewal is not an outage. The error names a value that would pass.
func (c Config) Check(agentTTL time.Duration) error {
	fields := []struct {
		name string
		d    time.Duration
	}{
		{"ca.x509_svid_ttl", c.X509SVIDTTL},
		{"ca.max_x509_svid_ttl", c.MaxX509SVIDTTL},
		{"the agents' SVID lifetime", agentTTL},
		{"ca.issuer_ttl", c.IssuerTTL},
		{"ca.root_ttl", c.RootTTL},
	}
	for _, f := range fields {
		if f.d < minTTL {
			return badConfig("%s is %v: set at least %v", f.name, f.d, minTTL)
		}
		if f.d > maxRootTTL {
			return badConfig("%s is %v: set at most %v", f.name, f.d, maxRootTTL)
		}
	}
	if c.X509SVIDTTL > c.MaxX509SVIDTTL {
		return badConfig("ca.x509_svid_ttl %v is longer than ca.max_x509_svid_ttl %v: set ca.max_x509_svid_ttl: %v, or a shorter ca.x509_svid_ttl",
			c.X509SVIDTTL, c.MaxX509SVIDTTL, c.X509SVIDTTL)
	}
	if c.Backdate < 0 || c.Backdate >= c.X509SVIDTTL/2 {
		return badConfig("ca.backdate %v must be less than half of ca.x509_svid_ttl %v: set ca.backdate: %v",
			c.Backdate, c.X509SVIDTTL, min(2*time.Minute, c.X509SVIDTTL/4))
	}
	longest := c.longestStream(agentTTL)
	if need := max(2*longest, longest+2*headroom); c.IssuerTTL < need {
		return badConfig("ca.issuer_ttl %v is too short for certificates that live %v: set ca.issuer_ttl: %v, or shorter lives below it",
			c.IssuerTTL, longest, need)
	}
	if need := 2 * c.IssuerTTL; c.RootTTL < need {
		return badConfig("ca.root_ttl %v is too short for issuers that live %v: set ca.root_ttl: %v, or a shorter ca.issuer_ttl",
			c.RootTTL, c.IssuerTTL, need)
	}
	return nil
}

// longestStream is the longest life of a certificate of the class stream.
func (c Config) longestStream(agentTTL time.Duration) time.Duration {
	return max(c.MaxX509SVIDTTL, agentTTL)
}

func badConfig(format string, args ...any) error {
	return fault.New(fault.Precondition, "config_ca", fmt.Sprintf(format, args...))
}
