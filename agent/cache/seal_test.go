package cache_test

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/agent/cache"
)

func (a *agent) sealed() string { return filepath.Join(a.dir, "run", "svids.sealed") }

// abandon ends the process as SIGKILL does: what is on the disk at this moment
// is what the next process finds.
func (a *agent) abandon() {
	a.t.Helper()
	copied := a.dir + "-killed"
	defer func() { _ = os.RemoveAll(copied) }()
	keep := func(from, to string) {
		if err := os.RemoveAll(to); err != nil {
			a.t.Fatal(err)
		}
		if err := os.CopyFS(to, os.DirFS(from)); err != nil {
			a.t.Fatal(err)
		}
	}
	keep(a.dir, copied)
	a.stop()
	keep(copied, a.dir)
	if err := filepath.WalkDir(a.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == a.dir {
			return err
		}
		mode := os.FileMode(0o600)
		if d.IsDir() {
			mode = 0o700
		}
		return os.Chmod(path, mode)
	}); err != nil {
		a.t.Fatal(err)
	}
}

// P4, NEG-59: a restart during an outage serves on.
func TestServesAfterAKillDuringAnOutage(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"), entry("2", "db", "unix:uid:1"))
		f.refuse["2"] = os.ErrInvalid
		a.start()
		time.Sleep(2 * time.Second)
		f.stop()
		a.abandon()
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "web") // db was refused: it keeps nobody waiting
		before := must(s.Snapshot())
		time.Sleep(20 * time.Minute)
		f.start()
		f.with(func() { clear(f.refuse) })
		awaitPaths(t, s, "web", "db")
		time.Sleep(time.Minute) // the stream may come back after the first signature
		if h := last(f.seen().hellos); h.GetRevision() != f.revision {
			t.Errorf("did not resume: %v", h)
		}
		if after := must(s.Snapshot()); !bytes.Equal(after.SVIDs[0].Key.DER(), before.SVIDs[0].Key.DER()) {
			t.Error("a good SVID was thrown away")
		}
	})
}

func TestSealedFileIsUselessWithoutTheAgentsKey(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		awaitPaths(t, s, "web")
		svid := must(s.Snapshot()).SVIDs[0]
		time.Sleep(2 * time.Second)
		data := must(os.ReadFile(a.sealed()))
		if info := must(os.Stat(a.sealed())); info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v", info.Mode())
		}
		if info := must(os.Stat(filepath.Dir(a.sealed()))); info.Mode().Perm() != 0o700 {
			t.Errorf("directory mode %v", info.Mode())
		}
		for what, secret := range map[string][]byte{"key": svid.Key.DER(), "certificate": svid.CertificatesDER[:64], "ID": []byte("web")} {
			if bytes.Contains(data, secret) || strings.Contains(string(data), hex.EncodeToString(secret)) {
				t.Errorf("the %s is there in the clear", what)
			}
		}
		// The workload's key is nowhere else on the disk either.
		err := filepath.WalkDir(a.dir, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			content := must(os.ReadFile(path))
			key := must(x509.ParsePKCS8PrivateKey(svid.Key.DER()))
			raw := must(key.(interface{ Bytes() ([]byte, error) }).Bytes())
			if bytes.Contains(content, raw) {
				t.Errorf("the key is in %s", path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		// A thief of the file has an agent of his own, with another key.
		s.Close()
		a.abandon()
		f.stop()
		if err := os.RemoveAll(filepath.Join(a.dir, "data")); err != nil {
			t.Fatal(err)
		}
		a.open()
		a.attest("thief")
		b := must(stateBundle(f))
		if err := a.state.SaveBundle(b); err != nil {
			t.Fatal(err)
		}
		a.start()
		s = a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "!not_synced")
	})
}

func TestRenewedAgentKeyOpensAndResealsTheFile(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		time.Sleep(2 * time.Second)
		// The agent is killed between its renewal and the next write.
		a.attest("one")
		f.stop()
		a.abandon()
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		wantPaths(t, s, "web")
		s.Close()
		f.start()
		time.Sleep(time.Minute)
		synctest.Wait()
		if keys := must(a.state.CacheKeys("svids")); len(keys) != 1 {
			t.Error("the old key is still kept")
		}
		f.stop()
		a.abandon()
		a.start()
		s = a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "web")
	})
}

// NEG-42: what is removed leaves the file promptly too.
func TestRemovedEntryLeavesTheSealedFile(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"), entry("2", "db", "unix:uid:1"))
		a.start()
		time.Sleep(10 * time.Second)
		f.remove("1")
		time.Sleep(1100 * time.Millisecond)
		f.stop()
		a.abandon()
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "db")
	})
}

func TestDamagedSealedFileCostsNothingWhileTheServerIsThere(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"empty":     func([]byte) []byte { return nil },
		"cut":       func(b []byte) []byte { return b[:len(b)/2] },
		"bit":       func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"old magic": func(b []byte) []byte { b[0] ^= 1; return b },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, a *agent) {
				f.set(entry("1", "web", "unix:uid:1"))
				a.start()
				time.Sleep(2 * time.Second)
				a.stop()
				if err := os.WriteFile(a.sealed(), damage(must(os.ReadFile(a.sealed()))), 0o600); err != nil {
					t.Fatal(err)
				}
				a.start()
				s := a.cache.Subscribe(sel("unix:uid:1"))
				defer s.Close()
				awaitPaths(t, s, "web")
			})
		})
	}
}

func TestSealedFileIsWrittenAtMostOncePerSecond(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		a.start()
		synctest.Wait()
		writes := 0
		var last []byte
		for i := range 100 {
			f.set(entry(fmt.Sprint(i), fmt.Sprintf("w/%d", i), "unix:uid:1"))
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
			if data := must(os.ReadFile(a.sealed())); !bytes.Equal(data, last) {
				writes++
				last = data
			}
		}
		if writes < 5 || writes > 12 {
			t.Errorf("%d writes in 10 s", writes)
		}
		a.stop()
		f.stop()
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		if n := len(paths(s)); n != 100 {
			t.Errorf("%d SVIDs after the restart: the end of a run must be written", n)
		}
	})
}

func FuzzSealedContent(f *testing.F) {
	f.Add(cache.SampleSealed())
	f.Fuzz(func(t *testing.T, data []byte) {
		again, ok := cache.RoundTripSealed(data)
		if !ok {
			return
		}
		if third, ok := cache.RoundTripSealed(again); !ok || !bytes.Equal(again, third) {
			t.Fatal("encoding what was decoded does not decode to the same")
		}
	})
}

// A kill in the middle of a write leaves a sealed file under another name: the
// next start sweeps it.
func TestLeftoverOfAKillIsSwept(t *testing.T) {
	inBubble(t, func(t *testing.T, _ *fake, a *agent) {
		a.start()
		synctest.Wait()
		a.stop()
		left := filepath.Join(a.dir, "run", ".svids.sealed.0123456789abcdef.tmp")
		if err := os.WriteFile(left, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		a.start()
		if _, err := os.Lstat(left); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it is still there: %v", err)
		}
	})
}
