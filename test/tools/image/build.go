package main

import (
	"debug/buildinfo"
	"debug/elf"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// build is what the binaries of one directory say of themselves.
type build struct {
	dir      string
	platform v1.Platform
	version  string
	revision string    // the commit, with +dirty behind it if there were changes
	made     time.Time // the commit's time: that of the build would make each image another
}

// readBuilds reads all binaries. They have to be of one commit, and each
// directory's of one platform that no other has.
func readBuilds(dirs []string) ([]build, error) {
	var builds []build
	seen := map[string]bool{}
	for _, dir := range dirs {
		var b build
		for i, program := range []string{"assay", "assay-server", "assay-agent"} {
			path := filepath.Join(dir, program)
			got, err := readBuild(path)
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", path, err)
			}
			if i == 0 {
				b = got
			}
			if !got.platform.Equals(b.platform) {
				return nil, fmt.Errorf("%s is for %v, assay beside it for %v: build them again", path, got.platform, b.platform)
			}
			if first := append(builds, b)[0]; got.version != first.version || got.revision != first.revision || !got.made.Equal(first.made) {
				return nil, fmt.Errorf("%s is %s (%s), others are %s (%s): build them again", path, got.version, got.revision, first.version, first.revision)
			}
		}
		if seen[b.platform.String()] {
			return nil, fmt.Errorf("%s is for %v as another directory is", dir, b.platform)
		}
		seen[b.platform.String()] = true
		b.dir = dir
		builds = append(builds, b)
	}
	return builds, nil
}

func readBuild(path string) (build, error) {
	if err := checkStatic(path); err != nil {
		return build{}, err
	}
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return build{}, err
	}
	b := build{version: info.Main.Version, made: time.Unix(0, 0).UTC()}
	if b.version == "" || b.version == "(devel)" {
		b.version = "devel"
	}
	dirty := ""
	for _, s := range info.Settings {
		switch s.Key {
		case "GOOS":
			b.platform.OS = s.Value
		case "GOARCH":
			b.platform.Architecture = s.Value
		case "vcs.revision":
			b.revision = s.Value
		case "vcs.modified":
			if s.Value == "true" {
				dirty = "+dirty"
			}
		case "vcs.time":
			if b.made, err = time.Parse(time.RFC3339, s.Value); err != nil {
				return build{}, err
			}
		}
	}
	if b.revision != "" {
		b.revision += dirty
	}
	return b, nil
}

// checkStatic refuses what needs a loader or libraries: the image has none.
func checkStatic(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("it is not static: build it with CGO_ENABLED=0")
		}
	}
	return nil
}
