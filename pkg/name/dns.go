package name

import "strings"

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
