//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Shell scripts can operate a server by what assay prints and how it exits.
// jq is played by this program, so that the test needs nothing installed; where
// the real one is, the script runs with it, too.
func TestOperatorsDayByScript(t *testing.T) {
	bins := plain.built(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	tools := t.TempDir()
	if err := os.Symlink(self, filepath.Join(tools, "jq")); err != nil {
		t.Fatal(err)
	}
	paths := map[string]string{"stand-in for jq": tools + ":" + bins}
	if _, err := exec.LookPath("jq"); err == nil {
		paths["jq"] = bins
	}
	for name, path := range paths {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "")
			s.StartServer()
			a, other := s.NewAgent("agent"), s.NewAgent("other")
			a.Start(a.Join())
			other.Start(other.Join())
			s.Server.Eventually(10*time.Second, "both agents", func() error {
				var status struct {
					Counts struct{ Connected int } `json:"agent_counts"`
				}
				if s.CLIJSON(&status, "status"); status.Counts.Connected != 2 {
					return fmt.Errorf("%d are connected", status.Counts.Connected)
				}
				return nil
			})
			cmd := exec.CommandContext(t.Context(), "testdata/operator.sh", a.ID, other.ID)
			cmd.Env = append(os.Environ(), "PATH="+path+":"+os.Getenv("PATH"), "ASSAY_SERVER_SOCKET="+s.AdminSocket(), "SPIFFE_ENDPOINT_SOCKET="+a.Endpoint(),
				"GORACE=atexit_sleep_ms=0") // else each call of the stand-in waits for a second at its end
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.HasSuffix(string(out), "done\n") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// playJQ does of jq what operator.sh needs: -r, a path, and its length.
func playJQ(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 2 || args[0] != "-r" {
		return errors.New("usage: jq -r FILTER")
	}
	var at any
	if err := json.NewDecoder(in).Decode(&at); err != nil {
		return err
	}
	path, length := strings.CutSuffix(args[1], " | length")
	for _, step := range regexp.MustCompile(`\.[a-z0-9_]+|\[[0-9]+\]`).FindAllString(path, -1) {
		switch v := at.(type) {
		case map[string]any:
			at = v[strings.TrimPrefix(step, ".")]
		case []any:
			var i int
			if _, err := fmt.Sscanf(step, "[%d]", &i); err != nil {
				return fmt.Errorf("%s of a list", step)
			}
			if at = nil; i < len(v) {
				at = v[i]
			}
		case nil:
		default:
			return fmt.Errorf("%s of %v", step, at)
		}
	}
	if length {
		list, ok := at.([]any)
		if !ok && at != nil {
			return fmt.Errorf("length of %v", at)
		}
		at = len(list)
	}
	if text, ok := at.(string); ok {
		_, err := fmt.Fprintln(out, text)
		return err
	}
	return json.NewEncoder(out).Encode(at)
}
