//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/test/harness"
)

// restoreTTL leaves the time that a restore takes, on a machine that is busy.
const restoreTTL = `ca:
  x509_svid_ttl: 60s
  max_x509_svid_ttl: 60s
attestation:
  agent_svid_ttl: 45s
`

// restore runs assay-server restore on the site's configuration.
func restore(s *harness.Site, args ...string) (stdout, stderr string, code int) {
	return s.Try("assay-server", append([]string{"restore", "--config", s.File("server.yaml")}, args...)...)
}

func mustRestore(t *testing.T, s *harness.Site, args ...string) string {
	t.Helper()
	stdout, stderr, code := restore(s, args...)
	if code != 0 {
		t.Fatalf("restore %q: exit %d, %s", args, code, stderr)
	}
	return stdout
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// refusesToStart wants the server to end with this code and reason.
func refusesToStart(t *testing.T, s *harness.Site, code int, reason string) {
	t.Helper()
	s.LaunchServer()
	<-s.Server.Done()
	log, err := os.ReadFile(s.File("server.log"))
	if err != nil {
		t.Fatal(err)
	}
	if s.Server.ExitCode() != code || !strings.Contains(string(log), reason) {
		t.Fatalf("exit %d, want %d with %s:\n%s", s.Server.ExitCode(), code, reason, log)
	}
}

// agentSerials are the active serials of all agents.
func agentSerials(s *harness.Site) map[string]string {
	var list struct {
		Agents []struct {
			ID     string `json:"id"`
			Serial string `json:"serial"`
		} `json:"agents"`
	}
	s.CLIJSON(&list, "agent", "list")
	serials := map[string]string{}
	for _, a := range list.Agents {
		serials[a.ID] = a.Serial
	}
	return serials
}

// renewedSince waits until every one of the agents has another serial.
func renewedSince(s *harness.Site, before map[string]string, agents ...*harness.Agent) {
	s.Server.Eventually(time.Minute, "the agents renew their certificates", func() error {
		now := agentSerials(s)
		for _, a := range agents {
			if now[a.ID] == before[a.ID] || now[a.ID] == "" {
				return fmt.Errorf("%s has %q", a.ID, now[a.ID])
			}
		}
		return nil
	})
}

func auditLines(t *testing.T, s *harness.Site, action string) (n int) {
	t.Helper()
	data, err := os.ReadFile(s.Audit())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(data), `"action":"`+action+`"`)
}

// NEG-56, BUN-4: the disk is lost and a backup is restored. Agents and workloads
// go on without a failed handshake, with certificates that the backup does not
// know; what was used or banned since stays so.
func TestAServerIsRestoredFromABackup(t *testing.T) {
	f := newFleetAt(t, newSite(t, restoreTTL), 2)
	s := f.site
	banned := s.NewAgent("banned")
	banned.Start(banned.Join())
	unused := s.NewAgent("late").Join()
	gone, used := s.NewAgent("gone"), s.NewAgent("used")
	token := used.Join()
	file := s.File("one.backup")

	var made struct {
		StoreRevision int64 `json:"store_revision"`
		Records       int   `json:"records"`
		Bytes         int64 `json:"bytes"`
	}
	before := agentSerials(s)
	s.CLIJSON(&made, "backup", file)
	if info, err := os.Stat(file); err != nil || info.Size() != made.Bytes || info.Mode().Perm() != 0o600 || made.Records < 10 {
		t.Errorf("%v, %v, %+v", info, err, made)
	}
	if _, stderr, code := s.Try("assay", "backup", file); code != 73 || !strings.Contains(stderr, "file_exists") {
		t.Errorf("over a backup: exit %d, %s", code, stderr)
	}
	if out := mustRestore(t, s, "--check", file); !strings.Contains(out, "nothing was changed") { // beside the server
		t.Errorf("check: %s", out)
	}

	renewedSince(s, before, f.agents...)
	s.CLI("agent", "ban", "--yes", banned.ID)
	<-banned.Done()
	used.Start(token)
	gone.Start(gone.Join())
	s.CreateEntry(f.agents[0].ID, "spiffe://example.org/later")
	var status struct {
		Sequence uint64 `json:"bundle_sequence"`
	}
	s.CLIJSON(&status, "status")
	sequence := status.Sequence
	s.Server.Stop(9)

	if err := os.Remove(s.File("server/data/store.db")); err != nil {
		t.Fatal(err)
	}
	out := mustRestore(t, s, file)
	for _, want := range []string{"restored", banned.ID, used.ID, gone.ID, "entries created since"} {
		if !strings.Contains(out, want) {
			t.Errorf("the report does not have %q:\n%s", want, out)
		}
	}
	if _, stderr, code := restore(s, file); code != 73 || !strings.Contains(stderr, "store_exists") {
		t.Errorf("over a store: exit %d, %s", code, stderr)
	}
	s.StartServer()
	s.CLIJSON(&status, "status")
	if status.Sequence <= sequence {
		t.Errorf("the bundle's sequence went from %d to %d", sequence, status.Sequence)
	}
	var entries struct {
		Count int `json:"count"`
	}
	s.CLIJSON(&entries, "entry", "count")
	if entries.Count != len(f.agents) {
		t.Errorf("%d entries", entries.Count)
	}
	s.Server.Eventually(time.Minute, "the agents' certificates are adopted", func() error {
		if n := auditLines(t, s, "agent.adopt"); n < len(f.agents) {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
	adopted := agentSerials(s)
	renewedSince(s, adopted, f.agents...) // and go on as ever
	for _, a := range f.agents {
		if n := strings.Count(a.Log(), "msg=attested "); n != 1 {
			t.Errorf("%s attested %d times", a.ID, n)
		}
	}

	// No token of before the restore lets anybody in.
	late := s.NewAgent("late2")
	late.Launch(unused)
	again := s.NewAgent("again")
	again.Launch(token)
	for _, a := range []*harness.Agent{late, again} {
		a.Eventually(time.Minute, "the token is refused", func() error {
			if !strings.Contains(a.Log(), "join_token_invalid") {
				return fmt.Errorf("not yet")
			}
			return nil
		})
	}
	var all struct {
		Agents []struct {
			ID     string `json:"id"`
			Banned bool   `json:"banned"`
		} `json:"agents"`
	}
	s.CLIJSON(&all, "agent", "list")
	stillBanned := false
	for _, a := range all.Agents {
		stillBanned = stillBanned || a.ID == banned.ID && a.Banned
	}
	if len(all.Agents) != 3 || !stillBanned {
		t.Errorf("agents %+v", all.Agents)
	}
	f.check()
}

// NEG-56: a store that went back in time is refused, whoever put it there, until
// an operator accepts that and says why.
func TestAStoreThatWentBackIsRefused(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	db, old := s.File("server/data/store.db"), s.File("old.db")
	s.Server.Stop(15)
	copyFile(t, db, old)
	s.StartServer()
	s.CreateEntry(a.ID, "spiffe://example.org/later")
	s.Server.Stop(15)
	copyFile(t, old, db)
	for range 2 { // the refusal itself hides nothing
		refusesToStart(t, s, 65, "store_rollback")
	}
	if data, err := os.ReadFile(db); err != nil || string(data) != readFile(t, old) {
		t.Errorf("the store was changed: %v", err)
	}

	if _, stderr, code := restore(s, "--accept-rollback"); code != 64 || !strings.Contains(stderr, "--reason") {
		t.Errorf("without a reason: exit %d, %s", code, stderr)
	}
	if _, stderr, code := restore(s); code != 64 || !strings.Contains(stderr, "name the backup") {
		t.Errorf("without a backup: exit %d, %s", code, stderr)
	}
	out := mustRestore(t, s, "--accept-rollback", "--reason", "the disk was a copy")
	if !strings.Contains(out, "entries created since") || !strings.Contains(out, "store.db.before-") {
		t.Errorf("report: %s", out)
	}
	if audit := readFile(t, s.Audit()); !strings.Contains(audit, `"action":"store.restore"`) || !strings.Contains(audit, "the disk was a copy") {
		t.Error("the audit log does not say who accepted it, and why")
	}
	s.StartServer()
	a.Eventually(time.Minute, "the agent acknowledges the bundle of the restored server", func() error {
		var st struct {
			Counts struct {
				Acknowledged int `json:"acknowledged"`
			} `json:"agent_counts"`
		}
		if s.CLIJSON(&st, "status"); st.Counts.Acknowledged != 1 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	s.Server.Stop(15)
	copyFile(t, old, db)
	refusesToStart(t, s, 65, "store_rollback")
}

// A backup brings nothing back that agents do not trust any more, and is of no
// use to those who changed it or lack the seal key.
func TestABackupThatCannotBeUsedIsRefused(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	file := s.File("one.backup")
	s.CLI("backup", file)
	if strings.Contains(readFile(t, file), strings.TrimSpace(readFile(t, s.File("seal/seal.key")))) {
		t.Error("the seal key is in the backup")
	}
	s.CLI("root", "rotate", "--yes")
	newer := s.File("two.backup")
	s.CLI("backup", newer)
	s.Server.Stop(15)
	copyFile(t, s.File("server/data/store.db"), s.File("kept.db"))
	if err := os.Remove(s.File("server/data/store.db")); err != nil {
		t.Fatal(err)
	}
	refused := func(code int, reason string, args ...string) {
		t.Helper()
		_, stderr, got := restore(s, args...)
		if got != code || !strings.Contains(stderr, "error: "+reason) {
			t.Errorf("%q: exit %d, want %d; %s", args, got, code, stderr)
		}
		if left, err := os.ReadDir(s.File("server/data")); err != nil || len(left) != 2 { // audit log and lock
			t.Errorf("%q left %v, %v", args, left, err)
		}
	}
	refused(65, "restore_roots_moved", file)
	refused(64, "usage", "--force", file)

	bad := []byte(readFile(t, newer))
	bad[len(bad)/2] ^= 1
	refused(65, "backup_damaged", s.Write("bad.backup", string(bad)))
	refused(65, "backup_damaged", s.Write("short.backup", readFile(t, newer)[:1000]))
	copyFile(t, s.File("seal/seal.key"), s.File("seal/right.key"))
	if err := os.Remove(s.File("seal/seal.key")); err != nil {
		t.Fatal(err)
	}
	s.Run("assay-server", "seal-key", s.File("seal/seal.key"))
	refused(78, "backup_seal_key", newer)
	copyFile(t, s.File("seal/right.key"), s.File("seal/seal.key"))

	mustRestore(t, s, "--force", "--reason", "nothing else is left", file)
	s.StartServer()
}

// The guide to backups, word for word but for the places.
func TestBackupsAsTheGuideSays(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	commands := guideCommands(t, "Backup and restore", "assay", "assay-server")
	if len(commands) != 4 {
		t.Fatalf("the guide's commands: %q", commands)
	}
	places := strings.NewReplacer("/var/backups/", s.File(""), "$(date +%F)", "2026-11-23",
		"assay-server restore", "assay-server restore --config "+s.File("server.yaml"))
	run := func(i int, want string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "bash", "-c", places.Replace(commands[i]))
		cmd.Env = append(os.Environ(), "PATH="+s.Bins+":"+os.Getenv("PATH"), "ASSAY_SERVER_SOCKET="+s.AdminSocket())
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
			t.Fatalf("%s: %v\n%s", commands[i], err, out)
		}
	}
	run(0, "store revision")
	run(1, "nothing was changed")
	s.CLI("token", "create")
	s.Server.Stop(9)
	db, old := s.File("server/data/store.db"), s.File("old.db")
	if err := os.Rename(db, old); err != nil {
		t.Fatal(err)
	}
	run(2, "restored")
	s.StartServer()
	s.CLI("status")
	s.Server.Stop(15)
	copyFile(t, old, db)
	refusesToStart(t, s, 65, "store_rollback")
	run(3, "restored")
	s.StartServer()
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
