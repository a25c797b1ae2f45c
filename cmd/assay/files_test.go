package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// setOf is a set whose files all say which generation they are of.
func setOf(generation int, names ...string) []file {
	var out []file
	for _, name := range names {
		perm := fs.FileMode(0o644)
		if strings.Contains(name, "key") {
			perm = 0o600
		}
		out = append(out, file{name: name, data: fmt.Appendf(nil, "%d", generation), perm: perm})
	}
	return out
}

func threeFiles(generation int) []file {
	return setOf(generation, "svid.pem", "svid_key.pem", "bundle.pem")
}

func open(t *testing.T, dir string) *output {
	t.Helper()
	o, err := openOutput(dir)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// seen is what a program finds under the stable names.
func seen(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, name := range []string{"svid.pem", "svid_key.pem", "bundle.pem", "svid.1.pem"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			out[name] = string(data)
		}
	}
	return out
}

func visible(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestPublishedFilesHaveTheirModesAndStableNames(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "tls")
	o := open(t, dir)
	defer o.close()
	if err := o.publish(threeFiles(1)); err != nil {
		t.Fatal(err)
	}
	if got := visible(t, dir); !slices.Equal(got, []string{".assay", "bundle.pem", "svid.pem", "svid_key.pem"}) {
		t.Errorf("%v", got)
	}
	for name, want := range map[string]fs.FileMode{"svid.pem": 0o644, "svid_key.pem": 0o600, "bundle.pem": 0o644, ".": 0o700} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

// A crash is a stop between two steps. Whatever the step, a reader has one
// whole set, and the next publish works and leaves no rubbish.
func TestCrashBetweenStepsNeverMixesSets(t *testing.T) {
	steps := []func(o *output, files []file) error{
		func(o *output, files []file) error { // in the middle of a set
			_, err := o.writeSet(files[:1])
			return err
		},
		func(o *output, files []file) error {
			_, err := o.writeSet(files)
			return err
		},
		func(o *output, files []file) error {
			if _, err := o.writeSet(files); err != nil {
				return err
			}
			return o.link(files)
		},
		func(o *output, files []file) error { // the link is made, not yet in place
			set, err := o.writeSet(files)
			if err != nil {
				return err
			}
			return os.Symlink(set, filepath.Join(o.inner, ".current.XYZ.tmp"))
		},
		func(o *output, files []file) error { // as above, for a stable name
			return os.Symlink(".assay/current/svid.pem", filepath.Join(o.dir, ".svid.pem.XYZ.tmp"))
		},
		func(o *output, files []file) error { // all done but sweeping
			set, err := o.writeSet(files)
			if err != nil {
				return err
			}
			if err := o.link(files); err != nil {
				return err
			}
			_, err = o.switchTo(set)
			return err
		},
	}
	for before := range 2 { // a first start, and a later one
		for i, step := range steps {
			dir := t.TempDir()
			o := open(t, dir)
			want := map[string]string{}
			if before > 0 {
				if err := o.publish(threeFiles(before)); err != nil {
					t.Fatal(err)
				}
				want = map[string]string{"svid.pem": "1", "svid_key.pem": "1", "bundle.pem": "1"}
			}
			next := setOf(2, "svid.pem", "svid_key.pem", "bundle.pem", "svid.1.pem")
			if err := step(o, next); err != nil {
				t.Fatal(err)
			}
			o.close() // the kernel does that for a dead process
			if i == len(steps)-1 {
				want = map[string]string{"svid.pem": "2", "svid_key.pem": "2", "bundle.pem": "2", "svid.1.pem": "2"}
			}
			if got := seen(t, dir); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("crash after step %d: %v, want %v", i, got, want)
			}
			o = open(t, dir)
			for generation := 3; generation < 5; generation++ {
				if err := o.publish(threeFiles(generation)); err != nil {
					t.Fatal(err)
				}
			}
			o.close()
			if got := visible(t, dir); !slices.Equal(got, []string{".assay", "bundle.pem", "svid.pem", "svid_key.pem"}) {
				t.Errorf("after step %d and a new start: %v", i, got)
			}
			if got := visible(t, filepath.Join(dir, ".assay")); len(got) != 4 { // current, lock, two sets
				t.Errorf("after step %d and a new start, inside: %v", i, got)
			}
		}
	}
}

// Readers that resolve the current set once read one set, however fast sets
// come: the one before the current one stays.
func TestReadersOfACurrentSetNeverSeeAMixture(t *testing.T) {
	dir := t.TempDir()
	o := open(t, dir)
	defer o.close()
	if err := o.publish(threeFiles(0)); err != nil {
		t.Fatal(err)
	}
	const generations = 20
	read := func() (string, error) {
		set, err := filepath.EvalSymlinks(filepath.Join(dir, ".assay", "current"))
		if err != nil {
			return "", err
		}
		var all []string
		for _, name := range []string{"svid.pem", "svid_key.pem", "bundle.pem"} {
			data, err := os.ReadFile(filepath.Join(set, name))
			if err != nil {
				return "", err
			}
			all = append(all, string(data))
		}
		if all[0] != all[1] || all[1] != all[2] {
			return "", fmt.Errorf("mixture %v", all)
		}
		return all[0], nil
	}
	stop := make(chan struct{})
	var reader sync.WaitGroup
	reads := 0
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			// Two generations in the time of three small reads is beyond the
			// promise; it shows as a missing file, never as a mixture.
			if _, err := read(); err != nil && !os.IsNotExist(err) {
				t.Error(err)
				return
			}
			reads++
		}
	})
	for g := 1; g <= generations; g++ {
		if err := o.publish(threeFiles(g)); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	reader.Wait()
	if got, err := read(); err != nil || got != fmt.Sprint(generations) {
		t.Errorf("%q, %v after %d reads", got, err, reads)
	}
}

func TestPublishReplacesPlainFilesAndLeavesOthersAlone(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"svid.pem": "old", "notes.txt": "mine"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("notes.txt", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	o := open(t, dir)
	defer o.close()
	if err := o.publish(threeFiles(1)); err != nil {
		t.Fatal(err)
	}
	if got := seen(t, dir); len(got) != 3 || got["svid.pem"] != "1" {
		t.Errorf("%v", got)
	}
	for _, name := range []string{"notes.txt", "link"} {
		if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != "mine" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
}

func TestDirectoryInUseIsRefused(t *testing.T) {
	dir := t.TempDir()
	o := open(t, dir)
	defer o.close()
	if second, err := openOutput(dir); err == nil {
		second.close()
		t.Error("two programs write to one directory")
	}
}

// A set that could not be written whole leaves nothing behind, its key least of
// all: a full disk is tried again and again.
func TestFailedSetIsRemoved(t *testing.T) {
	dir := t.TempDir()
	o := open(t, dir)
	defer o.close()
	if err := o.publish(threeFiles(1)); err != nil {
		t.Fatal(err)
	}
	before := visible(t, o.inner)
	// The file system takes no such name, or has a directory in its place.
	if err := os.MkdirAll(filepath.Join(dir, "taken", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		for _, name := range []string{strings.Repeat("x", 300), "taken"} {
			if err := o.publish(append(threeFiles(2), file{name: name, perm: 0o644})); err == nil {
				t.Fatal("published")
			}
		}
	}
	if got := visible(t, o.inner); !slices.Equal(got, before) {
		t.Errorf("%v, before %v", got, before)
	}
	if err := o.publish(threeFiles(3)); err != nil {
		t.Fatal(err)
	}
}
