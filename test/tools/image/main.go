// Command image puts the static binaries into OCI images, with no daemon and no
// base image: one archive for the server and one for the agent, which
// containerd, Podman, skopeo and docker load take.
//
// Each DIR has assay, assay-server and assay-agent for one platform. What the
// images say of themselves (platform, version, commit) is read from the binaries.
// The same binaries give the same bytes.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

func main() {
	out := flag.String("o", ".", "where the archives go")
	repository := flag.String("repository", "", "what comes before the images' names, such as registry.example/team")
	tag := flag.String("tag", "", "the images' tag instead of their version")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: image [-o DIR] [-repository NAME] [-tag TAG] DIR...")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(os.Stdout, *out, *repository, *tag, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(said io.Writer, out, repository, tag string, dirs []string) error {
	builds, err := readBuilds(dirs)
	if err != nil {
		return err
	}
	for _, k := range kinds() {
		ref, err := reference(repository, k.daemon, tag, builds[0])
		if err != nil {
			return err
		}
		index, err := k.index(builds)
		if err != nil {
			return fmt.Errorf("make %s: %w", k.daemon, err)
		}
		path := filepath.Join(out, k.daemon+".tar")
		if err := archive(path, ref, index); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
		fmt.Fprintf(said, "%s\t%s\n", path, ref)
	}
	return nil
}
