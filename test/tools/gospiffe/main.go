// Command gospiffe follows the Workload API with the release of go-spiffe that
// its module file names, and prints one line for each update: the SPIFFE IDs,
// the default one first. An error is a line that begins with "error: ". It ends
// when its input does. The end-to-end tests build it once for each module file
// beside it.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

type printer struct{}

func (printer) OnX509ContextUpdate(c *workloadapi.X509Context) {
	var ids []string
	for _, svid := range c.SVIDs {
		// What was delivered has to verify with what came beside it.
		if _, _, err := x509svid.Verify(svid.Certificates, c.Bundles); err != nil {
			fmt.Println("error:", err)
			return
		}
		ids = append(ids, svid.ID.String())
	}
	fmt.Println(strings.Join(ids, " "))
}

func (printer) OnX509ContextWatchError(err error) { fmt.Println("error:", err) }

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	if err := workloadapi.WatchX509Context(ctx, printer{}); err != nil && ctx.Err() == nil {
		fmt.Println("stopped:", err)
		os.Exit(1)
	}
}
