//go:build long

package rotation_test

import (
	"testing"
	"time"
)

// Sixteen months, since that is when a root of a year is replaced for the second
// time. // FED-4, PLAN-5, X509-20
func TestSixteenMonthsPass(t *testing.T) { timePasses(t, 365*24*time.Hour, 2) }
