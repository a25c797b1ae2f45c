//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// playProbe asks the server at address for its bundle, over a new connection
// each time, until its input ends, and prints how long each call took. It is a
// process of its own, so that it measures the server and not a busy test.
func playProbe(address string) error {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	for {
		begin := time.Now()
		if err := probe(address); err != nil {
			return err
		}
		fmt.Println(time.Since(begin))
		select {
		case <-ended:
			return nil
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func probe(address string) error {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(rpc.ClientTLSUnverified()))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err = agentv1.NewAgentClient(conn).Bundle(ctx, &agentv1.BundleRequest{})
	return err
}
