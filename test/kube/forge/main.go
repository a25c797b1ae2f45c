// Command forge is a hostile entrypoint: it makes the cgroups that it is given,
// moves into them and becomes the rest of its arguments.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

func main() {
	if err := forge(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "forge:", err)
		os.Exit(1)
	}
}

func forge(args []string) error {
	end := slices.Index(args, "--")
	if end < 0 || end == len(args)-1 {
		return errors.New("what to become is missing: forge DIR... -- COMMAND [ARGUMENTS]")
	}
	for _, dir := range args[:end] {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
	}
	return syscall.Exec(args[end+1], args[end+1:], os.Environ())
}
