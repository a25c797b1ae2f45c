//go:build e2e && long

package e2e

import "testing"

func TestHandshakesGoOnForFiftyRenewals(t *testing.T) {
	renewUnderRestarts(t, 50)
}
