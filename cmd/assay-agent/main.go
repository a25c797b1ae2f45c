// Command assay-agent is the daemon of a node: it proves the node to the server
// and gives the workloads on it their SVIDs.
package main

import (
	"context"
	"os"

	"github.com/seed-caa81108/assay/agent"
	"github.com/seed-caa81108/assay/pkg/daemon"
)

func main() {
	os.Exit(daemon.Main(context.Background(), program(), os.Args[1:], os.Stdout, os.Stderr))
}

func program() daemon.Program {
	return daemon.Program{
		Name:   "assay-agent",
		Short:  "The Assay agent of a node",
		Config: "/etc/assay-agent/agent.yaml",
		Load:   load,
	}
}

func load(path string) (daemon.Settings, error) {
	var cfg agent.Config
	if err := daemon.Load(path, &cfg); err != nil {
		return daemon.Settings{}, err
	}
	cfg, err := cfg.Validate()
	if err != nil {
		return daemon.Settings{}, err
	}
	return daemon.Settings{
		LogLevel:  cfg.Log.Level,
		LogFormat: cfg.Log.Format,
		Metrics:   cfg.Metrics.Listen,
		New: func(r daemon.Runtime) (daemon.Service, error) {
			return agent.New(cfg, agent.Deps{Log: r.Log, Registerer: r.Registerer, Version: r.Version})
		},
	}, nil
}
