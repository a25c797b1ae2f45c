#!/usr/bin/env bash
# Runs every fuzz target of the module, one after the other, for the given time
# (10s) or number of inputs (4000x).
set -euo pipefail
cd "$(dirname "$0")/.."
each=${1:-10s}
grep -rlE '^func Fuzz[A-Z]' --include='*_test.go' . | xargs -n1 dirname | sort -u | while read -r dir; do
	grep -hoE '^func Fuzz[A-Za-z0-9_]+' "$dir"/*_test.go | sed 's/^func //' | sort -u | while read -r target; do
		echo "--- $dir $target"
		go test "$dir" -run '^$' -fuzz "^$target\$" -fuzztime "$each" -fuzzminimizetime 10x </dev/null
	done
done
