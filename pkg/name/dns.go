package name

import (
	"strings"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// MaxDNSNames is how many DNS names a certificate may have.
const MaxDNSNames = 64

// CheckDNS holds the DNS names of one certificate to ValidDNS, their number and
// their being different. The fault is Invalid, "dns_name_invalid"; it never
// repeats the input.
func CheckDNS(names []string) error {
	if len(names) > MaxDNSNames {
		return fault.Newf(fault.Invalid, "dns_name_invalid", "there are at most %d DNS names", MaxDNSNames)
	}
	seen := make(map[string]bool, len(names))
	for i, dns := range names {
		folded := strings.ToLower(dns)
		switch {
		case !ValidDNS(dns):
			return fault.Newf(fault.Invalid, "dns_name_invalid", "DNS name number %d is no host name: "+
				"it has labels of letters, digits and dashes, 253 bytes in all, no trailing dot; a wildcard is a whole first label", i+1)
		case seen[folded]:
			return fault.Newf(fault.Invalid, "dns_name_invalid", "DNS name number %d is given twice", i+1)
		}
		seen[folded] = true
	}
	return nil
}

// ValidDNS holds a name to RFC 1123 section 2.1, plus "*." in front
// (RFC 9525 section 6.3). A name whose last label is a number is none: clients
// read it as an IP address, and the authority refuses to sign it.
func ValidDNS(name string) bool {
	if name == "" || len(name) > 253 {
		return false
	}
	name = strings.TrimPrefix(name, "*.")
	if last := name[strings.LastIndexByte(name, '.')+1:]; strings.Trim(last, "0123456789") == "" {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			c := label[i]
			if !lower(c) && !upper(c) && !digit(c) && c != '-' {
				return false
			}
		}
	}
	return true
}
