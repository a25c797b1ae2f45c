// Command zlint judges certificates by RFC 5280 with
// github.com/zmap/zlint. It reads DIR/*.der, which has to hold one of every kind
// that the product makes, and fails on any finding at notice or above. It does
// not believe its own silence: each certificate is also given to it spoilt in
// several ways, and every one of those has to be found.
package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"
)

// excluded are lints that the product fails on purpose.
var excluded = map[string]string{
	"e_ext_san_uri_host_not_fqdn_or_ip": "the host of a SPIFFE ID is a trust domain, which need not be a DNS name (SPIFFE-ID, section 2.1)",
}

// kinds are the files that must be there.
var kinds = []string{
	"root", "issuer", "server", "agent",
	"workload", "workload-dns", "workload-short", "workload-path", "workload-p384", "workload-rsa",
	"minted",
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: zlint DIR")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(dir string) error {
	lints, err := lint.GlobalRegistry().Filter(lint.FilterOptions{
		IncludeSources: lint.SourceList{lint.RFC5280},
		ExcludeNames:   slices.Collect(maps.Keys(excluded)),
	})
	if err != nil {
		return fmt.Errorf("choose lints: %w", err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.der"))
	if err != nil {
		return err
	}
	var errs []error
	seen, spoilt := map[string]bool{}, 0
	for _, file := range files {
		kind := strings.TrimSuffix(filepath.Base(file), ".der")
		seen[kind] = true
		der, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		found, err := judge(der, lints)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", kind, err))
			continue
		}
		for _, name := range found {
			errs = append(errs, fmt.Errorf("%s: %s", kind, name))
		}
		n, err := judgeSpoilt(der, lints)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", kind, err))
		}
		spoilt += n
	}
	for _, kind := range kinds {
		if !seen[kind] {
			errs = append(errs, fmt.Errorf("there is no certificate of kind %s in %s", kind, dir))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	fmt.Printf("zlint: %d certificates without a finding by %d lints; all of their %d spoilt forms found\n", len(files), len(lints.Names()), spoilt)
	return nil
}

// judge returns what the lints found, as "name: level: details".
func judge(der []byte, lints lint.Registry) ([]string, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse: %w", err)
	}
	var found []string
	for name, result := range zlint.LintCertificateEx(cert, lints).Results {
		if result.Status >= lint.Notice {
			found = append(found, strings.TrimSuffix(fmt.Sprintf("%s: %s: %s", name, result.Status, result.Details), ": "))
		}
	}
	slices.Sort(found)
	return found, nil
}

// judgeSpoilt spoils the certificate in all ways that apply to it and returns
// how many there were. Each must be found by the lint that it is meant for.
func judgeSpoilt(der []byte, lints lint.Registry) (int, error) {
	var errs []error
	n := 0
	for _, m := range mutants {
		bad, applies, err := m.apply(der)
		if err != nil {
			return n, fmt.Errorf("%s: %w", m.what, err)
		}
		if !applies {
			continue
		}
		n++
		found, err := judge(bad, lints)
		if err != nil {
			errs = append(errs, fmt.Errorf("with %s: %w", m.what, err))
			continue
		}
		if !slices.ContainsFunc(found, func(s string) bool { return strings.HasPrefix(s, m.lint+": ") }) {
			errs = append(errs, fmt.Errorf("with %s it should fail %s, and fails %q", m.what, m.lint, found))
		}
	}
	if n == 0 {
		errs = append(errs, errors.New("no way to spoil it applies, so nothing shows that the lints look at it"))
	}
	return n, errors.Join(errs...)
}
