package attest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// reuses is how often the attack gets the pid it wants, in each of its forms.
const reuses = 100

func playReuse() int {
	a, err := namespacedAttestor()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	r := &reuse{attestor: a, victim: os.Getenv(socketEnv)}
	if err := r.run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Printf("tries %d early %d late %d\n", r.tries, r.early, r.late)
	return 0
}

type reuse struct {
	attestor           *Attestor
	victim             string
	victimExe          exeID
	lis                net.Listener
	path               string
	tries, early, late int
}

func (r *reuse) run() error {
	dir, err := os.MkdirTemp("", "reuse")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	r.path = filepath.Join(dir, "s")
	lis, err := net.Listen("unix", r.path)
	if err != nil {
		return err
	}
	defer lis.Close()
	r.lis = r.attestor.Listener(lis)
	if r.victimExe, err = statExe(r.victim); err != nil {
		return err
	}
	for _, attack := range []struct {
		leaks *int
		late  bool // the process is pinned before it ends
	}{{&r.early, false}, {&r.late, true}} {
		for done := 0; done < reuses; {
			reused, leak, err := r.attempt(attack.late)
			if err != nil {
				return err
			}
			if reused {
				done++
				r.tries++
			}
			if leak {
				*attack.leaks++
			}
		}
	}
	return nil
}

// attempt says whether the victim got the attacker's pid, and whether the
// attacker's connection then passed for the victim's.
func (r *reuse) attempt(late bool) (reused, leak bool, err error) {
	attacker, stop, err := r.start("/proc/self/exe", "exit")
	if err != nil {
		return false, false, err
	}
	accepted, err := r.lis.Accept() // does not look at the peer yet
	if err != nil {
		return false, false, err
	}
	defer accepted.Close()
	var p *Peer
	if late {
		if p, err = r.shake(accepted); err != nil {
			return false, false, err
		}
		if err := p.Check(); err != nil {
			return false, false, fmt.Errorf("check of a live process: %w", err)
		}
	}
	if err := stop(); err != nil {
		return false, false, err
	}
	pid := attacker.Process.Pid
	if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
		return false, false, err
	}
	victim, stop, err := r.start(r.victim, "wait")
	if err != nil {
		return false, false, err
	}
	defer func() {
		if stopErr := stop(); err == nil {
			err = stopErr
		}
	}()
	if victim.Process.Pid != pid {
		return false, false, nil // a thread of ours was faster
	}
	if !late {
		if p, err = r.shake(accepted); err != nil {
			return false, false, err
		}
	}
	if p.Check() != nil {
		return true, false, nil
	}
	return true, late || p.facts.exe == r.victimExe, nil
}

func (r *reuse) shake(c net.Conn) (*Peer, error) {
	_, info, err := r.attestor.Credentials().ServerHandshake(c)
	if err != nil {
		return nil, err
	}
	return info.(*Peer), nil
}

// start runs a program that ends when stop is called.
func (r *reuse) start(program, part string) (*exec.Cmd, func() error, error) {
	cmd := exec.Command(program)
	cmd.Env = callerEnviron(part, r.path)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	return cmd, func() error {
		_ = in.Close()
		return cmd.Wait()
	}, nil
}
