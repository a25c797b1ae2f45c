//go:build e2e

package e2e

import (
	"bytes"
	"crypto/tls"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// ID-8, ID-9, ID-10, ID-17, ID-19: names at the edges of what is allowed work
// from the entry to a handshake, each as any other does.
func TestNamesAtTheEdge(t *testing.T) {
	for what, domain := range map[string]string{
		"like an address":      "1.2.3.4",
		"with underscores":     "a_b",
		"255 bytes":            strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("b", 63),
		"255 bytes, one label": strings.Repeat("c", 255),
	} {
		t.Run(what, func(t *testing.T) {
			s := newSite(t, "")
			s.TrustDomain = domain
			s.StartServer()
			a := s.NewAgent("agent")
			a.Start(a.Join())
			short := "spiffe://" + domain + "/A.b-c_0/..."
			longest := "spiffe://" + domain + "/"
			longest += strings.Repeat("x/", 100) + strings.Repeat("y", 2048-200-len(longest))
			for _, id := range []string{short, longest, strings.ToLower(short)} {
				s.CreateEntry(a.ID, id)
			}
			if out := s.CLI("entry", "list"); !strings.Contains(out, longest) {
				t.Errorf("the longest ID is not listed whole: %s", out)
			}

			s.CLI("wait", "--all-agents")
			ctx, cancel := patient(t, time.Minute)
			defer cancel()
			client, err := workloadapi.New(ctx, workloadapi.WithAddr(a.Endpoint()))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = client.Close() }()
			got, err := client.FetchX509Context(ctx)
			if err != nil {
				t.Fatal(err)
			}
			var ids []string
			for _, svid := range got.SVIDs {
				ids = append(ids, svid.ID.String())
			}
			if strings.Join(ids, " ") != strings.Join([]string{short, longest, strings.ToLower(short)}, " ") {
				t.Fatalf("got %q", ids)
			}
			self := got.SVIDs[1]
			if !bytes.Contains(self.Certificates[0].Raw, []byte(longest)) {
				t.Error("the certificate has another name")
			}
			peer := tlsconfig.AuthorizeID(spiffeid.RequireFromString(longest))
			lis, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(self, got.Bundles, peer))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = lis.Close() }()
			go func() {
				if conn, err := lis.Accept(); err == nil {
					_, _ = io.Copy(conn, conn)
					_ = conn.Close()
				}
			}()
			if err := shakeHands(lis.Addr().String(), tlsconfig.MTLSClientConfig(self, got.Bundles, peer)); err != nil {
				t.Error(err)
			}
		})
	}
}
