package harness

import (
	"fmt"
	"os"
	"slices"
)

// Program is the TB of a program that is no test.
type Program struct {
	cleanups []func()
	failed   bool
}

type failure string

// Run calls do and then what it has left to clean up. What do reports to
// Fatalf ends it and is returned.
func (p *Program) Run(do func()) (err error) {
	defer func() {
		switch got := recover().(type) {
		case nil:
		case failure:
			err = fmt.Errorf("%s", string(got))
		default:
			panic(got)
		}
		for _, f := range slices.Backward(p.cleanups) {
			f()
		}
	}()
	do()
	return nil
}

// Must fails when err is one.
func (p *Program) Must(err error) {
	if err != nil {
		p.Fatalf("%v", err)
	}
}

// Helper implements TB.
func (p *Program) Helper() {}

// Logf implements TB: it writes to standard error.
func (p *Program) Logf(format string, a ...any) { fmt.Fprintf(os.Stderr, format+"\n", a...) }

// Failed implements TB.
func (p *Program) Failed() bool { return p.failed }

// Cleanup implements TB.
func (p *Program) Cleanup(f func()) { p.cleanups = append(p.cleanups, f) }

// Errorf implements TB.
func (p *Program) Errorf(format string, a ...any) {
	p.failed = true
	p.Logf(format, a...)
}

// Fatalf implements TB. It ends what Run called.
func (p *Program) Fatalf(format string, a ...any) {
	p.failed = true
	panic(failure(fmt.Sprintf(format, a...)))
}
