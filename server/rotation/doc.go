// Package rotation replaces the root of a trust domain under a running fleet
// without cutting anybody off (design section 7).
//
// It owns the two gates and the order of the steps. What the states of a root
// are and how they change is package ca's; what agents say that they serve and
// hold is package registry's. The gates are functions of both and of the time:
//
//   - before a prepared root signs, everybody who verifies has it;
//   - before a root leaves the bundle, nobody holds anything under it.
//
// An agent's word is a claim. One that lies can hold a rotation up or break the
// workloads of its own node; it can't make the server sign under a root that
// another agent does not have.
//
// A Rotator drives the operation that the store has, so a rotation goes on after
// a crash at any step, and on any server. Every step is idempotent: the states
// of the roots say which one is next.
package rotation
