package harness

import (
	"fmt"
	"os"
	"syscall"
)

// Agent is one node of a site.
type Agent struct {
	*Process
	// ID that the agent has, once a token was made for it.
	ID string
	// Ops is its metrics port.
	Ops int
	// ServerPort is where it finds the server; tests put a proxy there.
	ServerPort int
	// More is appended to its configuration.
	More string
	// CertificateFile and KeyFile, if set, are how it proves the node, and then
	// it needs no token.
	CertificateFile, KeyFile string
	// Cluster and TokenFile, if set, are how the pod of an agent proves its node.
	Cluster, TokenFile string

	site *Site
	name string
}

// Token is a join token with what the agent's config needs beside it.
type Token struct {
	Token   string `json:"token"`
	AgentID string `json:"agent_id"`
	Pin     string `json:"pin"`
}

// NewAgent names an agent; the name is its directory in the site.
func (s *Site) NewAgent(name string) *Agent {
	return &Agent{site: s, name: name, Ops: s.ports.Free(s.tb), ServerPort: s.Port}
}

// Socket is the path of the agent's Workload API.
func (a *Agent) Socket() string { return a.site.File(a.name + "/pub/api.sock") }

// Endpoint is Socket as an address.
func (a *Agent) Endpoint() string { return "unix://" + a.Socket() }

// SDSSocket is the path of the agent's socket for Envoy.
func (a *Agent) SDSSocket() string { return a.site.File(a.name + "/pub/sds.sock") }

// RunDir is what a reboot empties.
func (a *Agent) RunDir() string { return a.site.File(a.name + "/run") }

// Join makes a token for the agent, with further flags, and notes the ID that
// the agent will get.
func (a *Agent) Join(flags ...string) Token {
	a.site.tb.Helper()
	var out Token
	a.site.CLIJSON(&out, append([]string{"token", "create"}, flags...)...)
	a.ID = out.AgentID
	return out
}

// Start starts the agent and waits until it is ready.
func (a *Agent) Start(token Token, env ...string) *Agent {
	a.site.tb.Helper()
	a.Launch(token, env...)
	a.WaitReady(a.Ops)
	return a
}

// Launch starts the agent without waiting; an empty token means the one of
// before.
func (a *Agent) Launch(token Token, env ...string) {
	a.site.tb.Helper()
	a.Process = Start(a.site.tb, a.site.File(a.name+".log"), env, a.site.bin("assay-agent"), "run", "--config", a.Configure(token))
}

// Configure writes the agent's configuration and returns its path; an empty
// token means the one of before.
func (a *Agent) Configure(token Token) string {
	a.site.tb.Helper()
	return a.site.Write(a.name+".yaml", fmt.Sprintf(`trust_domain: %s
server:
  addresses: [127.0.0.1:%d]
%ssockets:
  dir: %s
data_dir: %s
run_dir: %s
metrics:
  listen: 127.0.0.1:%d
%s`, a.site.TrustDomain, a.ServerPort, a.evidence(token), a.site.File(a.name+"/pub"), a.site.File(a.name+"/data"), a.RunDir(), a.Ops, a.More))
}

// evidence is how the agent knows its server and proves itself to it.
func (a *Agent) evidence(token Token) string {
	a.site.tb.Helper()
	switch {
	case a.CertificateFile != "":
		return fmt.Sprintf("trust_bundle: %s\nx509pop:\n  certificate_file: %s\n  private_key_file: %s\n", a.bundle(), a.CertificateFile, a.KeyFile)
	case a.Cluster != "":
		return fmt.Sprintf("trust_bundle: %s\nk8s_psat:\n  cluster: %s\n  token_file: %s\n", a.bundle(), a.Cluster, a.TokenFile)
	}
	if token.Token != "" {
		a.site.Write(a.name+".token", token.Token)
		a.site.Write(a.name+".pin", token.Pin)
	}
	pin, err := os.ReadFile(a.site.File(a.name + ".pin"))
	if err != nil {
		a.site.tb.Fatalf("an agent needs a token or a certificate first: %v", err)
	}
	return fmt.Sprintf("pin: %s\njoin_token_file: %s\n", pin, a.site.File(a.name+".token"))
}

// bundle is a file with the server's bundle as it was at first: the server may be
// away later.
func (a *Agent) bundle() string {
	a.site.tb.Helper()
	path := a.site.File(a.name + ".bundle")
	if _, err := os.Stat(path); err != nil {
		a.site.Write(a.name+".bundle", a.site.CLI("bundle", "show"))
	}
	return path
}

// DataDir is what has to survive a reboot.
func (a *Agent) DataDir() string { return a.site.File(a.name + "/data") }

// Log is what the agent has logged so far.
func (a *Agent) Log() string {
	a.site.tb.Helper()
	data, err := os.ReadFile(a.site.File(a.name + ".log"))
	if err != nil {
		a.site.tb.Fatalf("read the agent's log: %v", err)
	}
	return string(data)
}

// Restart ends the agent with sig and starts it again.
func (a *Agent) Restart(sig syscall.Signal) {
	a.site.tb.Helper()
	a.Stop(sig)
	a.Start(Token{})
}
