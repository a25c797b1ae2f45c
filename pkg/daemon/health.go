package daemon

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const healthTimeout = 5 * time.Second

// CheckHealth asks the operations listener at addr whether its daemon is ready
// and returns the daemon's own reason if it is not.
func CheckHealth(ctx context.Context, addr string) error {
	target, err := dialable(addr)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+target+"/readyz", nil)
	if err != nil {
		return usage(fmt.Sprintf("%q is not host:port", clip(addr)))
	}
	client := http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true}, // and no proxy: this is about the one daemon
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return fault.Wrap(fault.NotReady, err, "unreachable", "nothing answers at "+target+": is the daemon running, and is that its metrics.listen?")
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	switch {
	case err != nil:
		return fault.Wrap(fault.NotReady, err, "unreachable", target+" did not finish its answer")
	case resp.StatusCode == http.StatusServiceUnavailable:
		return fault.New(fault.NotReady, "not_ready", oneLine(string(text)))
	case resp.StatusCode != http.StatusOK:
		return fault.Newf(fault.NotReady, "not_a_daemon", "%s answers %d where an Assay daemon answers 200 or 503: is that its metrics.listen?", target, resp.StatusCode)
	}
	return nil
}

// dialable turns an address to listen on into one to dial.
func dialable(addr string) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || port == "" {
		return "", usage(fmt.Sprintf("%q is not host:port", clip(addr)))
	}
	switch host {
	case "", "0.0.0.0":
		host = "127.0.0.1"
	case "::":
		host = "::1"
	}
	return net.JoinHostPort(host, port), nil
}
