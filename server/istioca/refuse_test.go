package istioca

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
	istiov1 "istio.io/api/security/v1alpha1"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
)

// hangingDisk records nothing and says nothing.
type hangingDisk struct{}

func (hangingDisk) Record(ctx context.Context, _ ...audit.Line) error {
	<-ctx.Done()
	return ctx.Err()
}

// An audit log whose disk hangs does not hold a caller for ever: those of a mesh have
// no deadline of their own.
func TestARefusalThatCannotBeRecordedEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Service{cfg: Config{Audiences: audiences}, audit: hangingDisk{}, strangers: rate.NewLimiter(1, 1)}
		began := time.Now()
		_, err := s.create(t.Context(), &istiov1.IstioCertificateRequest{})
		if fault.KindOf(err) != fault.NotReady || time.Since(began) > recordWithin {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}
