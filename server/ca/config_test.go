package ca

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func TestConfigDefaults(t *testing.T) {
	got := Config{}.WithDefaults()
	want := Config{X509SVIDTTL: time.Hour, MaxX509SVIDTTL: time.Hour, RootTTL: 8760 * time.Hour, IssuerTTL: 24 * time.Hour, Backdate: 2 * time.Minute}
	if got.AutoRotate == nil || !*got.AutoRotate {
		t.Error("roots are not rotated by themselves")
	}
	if got.AutoRotate = nil; got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if err := got.Check(12 * time.Hour); err != nil {
		t.Error(err)
	}
	if got := (Config{X509SVIDTTL: time.Minute}).WithDefaults().Backdate; got != 15*time.Second {
		t.Errorf("back-dating %v of a minute", got)
	}
	if got := (Config{Backdate: time.Second}).WithDefaults().Backdate; got != time.Second {
		t.Errorf("a back-dating that was set became %v", got)
	}
}

// I6, ZT-9: what can't be honoured is refused, and the message's value would pass.
func TestConfigMessagesProposeValuesThatPass(t *testing.T) {
	day := 24 * time.Hour
	proposal := regexp.MustCompile(`set (?:(ca\.\w+): |at least |at most )([0-9hms.]+)`)
	for name, c := range map[string]struct {
		config Config
		agent  time.Duration
		says   string
	}{
		"svid over cap":         {Config{X509SVIDTTL: 2 * time.Hour}, 12 * time.Hour, "ca.max_x509_svid_ttl: 2h"},
		"negative":              {Config{X509SVIDTTL: -1}, 12 * time.Hour, "ca.x509_svid_ttl is -1ns"},
		"tiny":                  {Config{X509SVIDTTL: time.Second}, 12 * time.Hour, "at least 5s"},
		"tiny agent":            {Config{}, time.Second, "agents"},
		"no agent":              {Config{}, 0, "agents"},
		"back-dating half":      {Config{X509SVIDTTL: 10 * time.Minute, Backdate: 5 * time.Minute}, 12 * time.Hour, "ca.backdate: 2m"},
		"back-dating negative":  {Config{Backdate: -time.Second}, 12 * time.Hour, "ca.backdate"},
		"issuer short":          {Config{IssuerTTL: 23 * time.Hour}, 12 * time.Hour, "ca.issuer_ttl: 24h"},
		"issuer short of room":  {Config{X509SVIDTTL: time.Minute, MaxX509SVIDTTL: time.Minute, IssuerTTL: 10 * time.Minute}, time.Minute, "ca.issuer_ttl: 21m"},
		"issuer and long svids": {Config{MaxX509SVIDTTL: 3 * day}, 12 * time.Hour, "ca.issuer_ttl: 144h"},
		"root short":            {Config{RootTTL: 47 * time.Hour}, 12 * time.Hour, "ca.root_ttl: 48h"},
		"root of ages":          {Config{RootTTL: 1 << 62}, 12 * time.Hour, "at most 219000h"},
	} {
		config := c.config.WithDefaults()
		err := config.Check(c.agent)
		if fault.ReasonOf(err) != "config_ca" || fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v, want it to say %q", name, err, c.says)
			continue
		}
		// Doing what the message says leads to a configuration that passes.
		agent := c.agent
		for range 5 {
			found := proposal.FindStringSubmatch(err.Error())
			if found == nil {
				t.Fatalf("%s: no proposal in %v", name, err)
			}
			value, perr := time.ParseDuration(found[2])
			if perr != nil {
				t.Fatal(perr)
			}
			field := found[1]
			if field == "" {
				field = strings.Fields(strings.TrimPrefix(err.Error(), "config_ca: "))[0]
			}
			switch field {
			case "ca.x509_svid_ttl":
				config.X509SVIDTTL = value
				config.Backdate = value / 4
			case "ca.max_x509_svid_ttl":
				config.MaxX509SVIDTTL = value
			case "ca.backdate":
				config.Backdate = value
			case "ca.issuer_ttl":
				config.IssuerTTL = value
			case "ca.root_ttl":
				config.RootTTL = value
			default:
				agent = value
			}
			if err = config.Check(agent); err == nil {
				break
			}
		}
		if err != nil {
			t.Errorf("%s: following the messages ends at %v", name, err)
		}
	}
}

func TestOpenRefusesABadConfig(t *testing.T) {
	w := newWorld(t)
	w.opts.Config.IssuerTTL = time.Hour
	_, err := Open(t.Context(), w.opts)
	wantReason(t, err, fault.Precondition, "config_ca")
	if len(w.raw()) != 0 {
		t.Error("the store was written to")
	}
}
