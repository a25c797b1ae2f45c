package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// programs builds a static program for a platform and puts it where the three
// are expected.
func programs(t *testing.T, arch string, env ...string) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "assay")
	build := exec.Command("go", "build", "-trimpath", "-o", path, "./testdata/program")
	build.Env = append(append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch), env...)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"assay-server", "assay-agent"} {
		if err := os.Link(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// files is what a tar archive has, in its order.
func files(t *testing.T, r io.Reader) (headers []*tar.Header, content map[string][]byte) {
	t.Helper()
	content = map[string][]byte{}
	for archive := tar.NewReader(r); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return headers, content
		}
		if err != nil {
			t.Fatal(err)
		}
		headers = append(headers, h)
		if content[h.Name], err = io.ReadAll(archive); err != nil {
			t.Fatal(err)
		}
	}
}

// blobs reads an archive as one without go-containerregistry would.
type blobs struct {
	t     *testing.T
	files map[string][]byte
}

func (b blobs) decode(digest string, into any) {
	b.t.Helper()
	data, ok := b.files["blobs/"+strings.Replace(digest, ":", "/", 1)]
	if !ok {
		b.t.Fatalf("there is no %s", digest)
	}
	if err := json.Unmarshal(data, into); err != nil {
		b.t.Fatal(err)
	}
}

type descriptor struct {
	MediaType, Digest string
	Platform          struct{ OS, Architecture string }
	Annotations       map[string]string
}

func TestWhatIsInTheImages(t *testing.T) {
	amd64, arm64, out := programs(t, "amd64"), programs(t, "arm64"), t.TempDir()
	if err := run(io.Discard, out, "registry.example/team", "v1.2.3", []string{amd64, arm64}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, user string }{{"assay-server", "65532:65532"}, {"assay-agent", "0:0"}} {
		data, err := os.ReadFile(filepath.Join(out, c.name+".tar"))
		if err != nil {
			t.Fatal(err)
		}
		_, content := files(t, bytes.NewReader(data))
		b := blobs{t, content}
		var top, index struct{ Manifests []descriptor }
		if err := json.Unmarshal(content["index.json"], &top); err != nil {
			t.Fatal(err)
		}
		if got := top.Manifests[0].Annotations["io.containerd.image.name"]; got != "registry.example/team/"+c.name+":v1.2.3" {
			t.Errorf("its name is %s", got)
		}
		b.decode(top.Manifests[0].Digest, &index)
		if len(top.Manifests) != 1 || len(index.Manifests) != 2 {
			t.Fatalf("%d indexes, %d images", len(top.Manifests), len(index.Manifests))
		}
		for i, arch := range []string{"amd64", "arm64"} {
			if p := index.Manifests[i].Platform; p.OS != "linux" || p.Architecture != arch {
				t.Errorf("image %d is for %v", i, p)
			}
			b.checkImage(index.Manifests[i].Digest, arch, c.name, c.user, []string{amd64, arm64}[i])
		}
		var docker []struct {
			Config   string
			RepoTags []string
			Layers   []string
		}
		if err := json.Unmarshal(content["manifest.json"], &docker); err != nil || len(docker) != 1 || len(docker[0].Layers) != 2 {
			t.Fatalf("%s, %v", content["manifest.json"], err)
		}
		for _, name := range append(docker[0].Layers, docker[0].Config) {
			if content[name] == nil {
				t.Errorf("manifest.json names %s, which is not there", name)
			}
		}
	}
}

// checkImage looks at the configuration, and that the image has its two programs
// and nothing else: no shell, no directory, no list of users.
func (b blobs) checkImage(digest, arch, daemon, user, dir string) {
	b.t.Helper()
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	b.decode(digest, &manifest)
	var config struct {
		OS, Architecture string
		Config           struct {
			User            string
			Entrypoint, Env []string
			Labels          map[string]string
		}
	}
	b.decode(manifest.Config.Digest, &config)
	if config.Architecture != arch || config.Config.User != user || !reflect.DeepEqual(config.Config.Entrypoint, []string{"/" + daemon}) {
		b.t.Errorf("%s: %+v", daemon, config)
	}
	for _, label := range []string{"title", "version", "source", "licenses"} {
		if config.Config.Labels["org.opencontainers.image."+label] == "" {
			b.t.Errorf("%s has no label %s", daemon, label)
		}
	}
	var names []string
	for _, l := range manifest.Layers {
		unpacked, err := gzip.NewReader(bytes.NewReader(b.files["blobs/"+strings.Replace(l.Digest, ":", "/", 1)]))
		if err != nil {
			b.t.Fatal(err)
		}
		headers, content := files(b.t, unpacked)
		for _, h := range headers {
			names = append(names, h.Name)
			want, err := os.ReadFile(filepath.Join(dir, h.Name))
			if err != nil || !bytes.Equal(content[h.Name], want) {
				b.t.Errorf("%s is another file than the one that was given (%v)", h.Name, err)
			}
			if h.Typeflag != tar.TypeReg || h.Mode != 0o555 || h.Uid != 0 || h.Gid != 0 {
				b.t.Errorf("%s: %+v", h.Name, h)
			}
		}
	}
	if !reflect.DeepEqual(names, []string{"assay", daemon}) {
		b.t.Errorf("%s has %v", daemon, names)
	}
}

func TestSameBytesAgain(t *testing.T) {
	dir := programs(t, "amd64")
	var before [][]byte
	for i := range 2 {
		out := t.TempDir()
		for _, program := range []string{"assay", "assay-server", "assay-agent"} {
			// Time and mode are no part of it.
			now := time.Unix(int64(1e9*(i+1)), 0)
			if err := errors.Join(os.Chtimes(filepath.Join(dir, program), now, now), os.Chmod(filepath.Join(dir, program), 0o700|os.FileMode(i))); err != nil {
				t.Fatal(err)
			}
		}
		if err := run(io.Discard, out, "", "", []string{dir}); err != nil {
			t.Fatal(err)
		}
		for j, name := range []string{"assay-server.tar", "assay-agent.tar"} {
			data, err := os.ReadFile(filepath.Join(out, name))
			if err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				before = append(before, data)
			} else if !bytes.Equal(before[j], data) {
				t.Errorf("%s has other bytes the second time", name)
			}
		}
	}
}

// The archives are OCI layouts as go-containerregistry checks them: each digest,
// size and media type.
func TestLayoutIsValid(t *testing.T) {
	out := t.TempDir()
	if err := run(io.Discard, out, "", "", []string{programs(t, "amd64"), programs(t, "arm64")}); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(out, "assay-agent.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	_, content := files(t, f)
	for name, data := range content {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(name, "/") {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
}

func TestWhatIsRefused(t *testing.T) {
	amd64 := programs(t, "amd64")
	mixed := programs(t, "arm64")
	if err := errors.Join(os.Remove(filepath.Join(mixed, "assay-agent")), os.Link(filepath.Join(amd64, "assay-agent"), filepath.Join(mixed, "assay-agent"))); err != nil {
		t.Fatal(err)
	}
	script := programs(t, "amd64")
	if err := errors.Join(os.Remove(filepath.Join(script, "assay")), os.WriteFile(filepath.Join(script, "assay"), []byte("#!/bin/sh\n"+strings.Repeat("#", 1000)), 0o700)); err != nil {
		t.Fatal(err)
	}
	for want, c := range map[string]struct {
		dirs []string
		tag  string
	}{
		"no such file":         {[]string{t.TempDir()}, ""},
		"bad magic number":     {[]string{script}, ""},
		"as another directory": {[]string{amd64, programs(t, "amd64")}, ""},
		"build them again":     {[]string{mixed}, ""},
		"it is not static":     {[]string{programs(t, "amd64", "GOFLAGS=-buildmode=pie")}, ""},
		"tag can only contain": {[]string{amd64}, "a b"},
	} {
		out := t.TempDir()
		err := run(io.Discard, out, "", c.tag, c.dirs)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
		if left, _ := os.ReadDir(out); len(left) != 0 {
			t.Errorf("%s: there is %v", want, left)
		}
	}
}

func TestReference(t *testing.T) {
	for _, c := range []struct{ repository, tag, version, want string }{
		{"", "", "v1.2.3", "docker.io/library/assay-server:v1.2.3"},
		{"", "", "v0.0.0-20261126185613-88fec7a88806+dirty", "docker.io/library/assay-server:v0.0.0-20261126185613-88fec7a88806-dirty"},
		{"team", "x", "v1.2.3", "docker.io/team/assay-server:x"},
		{"registry.example:5000/a/b", "", "devel", "registry.example:5000/a/b/assay-server:devel"},
	} {
		got, err := reference(c.repository, "assay-server", c.tag, build{version: c.version})
		if got != c.want {
			t.Errorf("%s, %v, want %s", got, err, c.want)
		}
	}
	if fmt.Sprint(kinds()[0].labels(build{})["org.opencontainers.image.revision"]) != "" {
		t.Error("a label with nothing in it")
	}
}
