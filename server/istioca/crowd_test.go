package istioca

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/peer"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/kube"
	"github.com/seed-caa81108/assay/server/limit"
)

// One outage that many questions meet at once counts as one.
func TestFailuresThatCameTogetherOpenTheBreakerOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &asker{answer: func(ctx context.Context, _ string) (kube.Account, error) {
			<-ctx.Done()
			return kube.Account{}, errAway
		}}
		r := a.reviews()
		var all sync.WaitGroup
		for i := range maxReviews {
			all.Go(func() { _, _ = r.verify(t.Context(), token{text: fmt.Sprint(i)}) })
		}
		all.Wait()
		if left := time.Until(r.breaker.until); left > 2*minBreak {
			t.Errorf("nobody is asked for %v", left)
		}
	})
}

// Who waited for a place has the whole time for its question.
func TestAFullHouseIsNoOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &asker{answer: func(ctx context.Context, _ string) (kube.Account, error) {
			select {
			case <-time.After(900 * time.Millisecond):
				return kube.Account{}, refused("token_invalid", "no")
			case <-ctx.Done():
				return kube.Account{}, errAway
			}
		}}
		r := a.reviews()
		var all sync.WaitGroup
		for i := range 500 {
			all.Go(func() { _, _ = r.verify(t.Context(), token{text: fmt.Sprint(i)}) })
		}
		all.Wait()
		if r.breaker.open() {
			t.Error("the API server answered each question in less than a second, and is not asked any more")
		}
	})
}

// slowNo is nobody's verifier, and takes its time.
type slowNo struct{ n atomic.Int32 }

func (*slowNo) known(token) (kube.Account, error, bool) { return kube.Account{}, nil, false }

func (s *slowNo) verify(context.Context, token) (kube.Account, error) {
	s.n.Add(1)
	time.Sleep(100 * time.Millisecond) // of a bubble
	return kube.Account{}, refused("token_invalid", "no")
}

// NEG-30: however many an address sends at once, so many are asked about.
func TestForgedTokensSentTogetherAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &slowNo{}
		s := &Service{cfg: Config{Audiences: audiences}, sources: []*source{{name: "a", verifier: v}}, failures: limit.NewRates(failuresPerSecond), verifying: newTurns(verifiedAtOnce), networkFailures: limit.NewRates(10 * failuresPerSecond), networkVerifying: newTurns(10 * verifiedAtOnce)}
		var all sync.WaitGroup
		for i := range 2000 {
			all.Go(func() {
				text := encoded(`{"alg":"ES256"}`, fmt.Sprintf(`{"sub":"system:serviceaccount:foo:sleep","aud":"istio-ca","jti":"%d"}`, i), "sig")
				_, _, _ = s.authenticate(incoming("authorization", "Bearer "+text))
			})
		}
		all.Wait()
		if n := v.n.Load(); n > limit.BurstSeconds*failuresPerSecond+verifiedAtOnce+20 {
			t.Errorf("%d tokens that are nobody's were asked about", n)
		}
	})
}

// One who has a network of addresses is held to ten times as much as one address,
// and troubles nobody outside it. // NEG-30
func TestForgedTokensOfANetworkAreBounded(t *testing.T) {
	v := &slowNo{}
	synctest.Test(t, func(t *testing.T) {
		s := &Service{
			cfg: Config{Audiences: audiences}, sources: []*source{{name: "a", verifier: v}}, failures: limit.NewRates(failuresPerSecond),
			verifying: newTurns(verifiedAtOnce), networkFailures: limit.NewRates(10 * failuresPerSecond), networkVerifying: newTurns(10 * verifiedAtOnce),
		}
		from := func(ip net.IP, i int) error {
			text := encoded(`{"alg":"ES256"}`, fmt.Sprintf(`{"sub":"system:serviceaccount:foo:sleep","aud":"istio-ca","jti":"%d"}`, i), "sig")
			ctx := peer.NewContext(incoming("authorization", "Bearer "+text), &peer.Peer{Addr: &net.TCPAddr{IP: ip, Port: 1000}})
			_, _, err := s.authenticate(ctx)
			return err
		}
		const most = 10 * failuresPerSecond * limit.BurstSeconds
		var all sync.WaitGroup
		for i := range 3 * most {
			all.Go(func() { _ = from(net.IP{0x20, 1, 0xd, 0xb8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, byte(i >> 8), byte(i)}, i) })
		}
		all.Wait()
		if n := int(v.n.Load()); n < most || n > most+20*verifiedAtOnce {
			t.Errorf("%d of %d tokens of a network were asked about", n, 3*most)
		}
		asked := v.n.Load()
		if err := from(net.IP{0x20, 1, 0xd, 0xb8, 0, 0, 0, 1, 0xff, 0, 0, 0, 0, 0, 0, 1}, 0); fault.CauseOf(err) != "limit_failed_tokens" || v.n.Load() != asked {
			t.Errorf("a new address of the network: %v", err)
		}
		if err := from(net.IP{0x20, 1, 0xd, 0xb8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1}, 0); fault.CauseOf(err) != "token_invalid" {
			t.Errorf("an address of another: %v", err)
		}
	})
}
