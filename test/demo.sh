#!/usr/bin/env bash
# The main job in front of your eyes: a server and an agent as one process of
# yours, a node attested by join token, this process attested by what the kernel
# says of it, its X.509-SVID delivered, verified, and renewed.
#
# Usage: test/demo.sh DIRECTORY_OF_BINARIES
set -euo pipefail
PATH="$(cd "$1" && pwd):$PATH"

dir=$(mktemp -d)
pids=()
cleanup() {
	status=$?
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
	for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
	if ((status)); then sed 's/^/    /' "$dir"/*.log >&2; fi
	rm -rf "$dir"
	exit "$status"
}
trap cleanup EXIT

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
field() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" "$dir/dev.json"; }
until_true() { # until_true SECONDS COMMAND...: polls
	local deadline=$((SECONDS + $1))
	shift
	until "$@"; do
		((SECONDS < deadline)) || { echo "demo: gave up on: $*" >&2; return 1; }
		sleep 0.05
	done
}

say "1. A server and an agent, in one process, as $(id -un). SVIDs live ten seconds here, an hour by default."
assay dev --dir "$dir/dev" --x509-svid-ttl 10s -o json >"$dir/dev.json" 2>"$dir/dev.log" &
pids+=($!)
until_true 30 test -s "$dir/dev.json"
agent=$(field agent_id)
export ASSAY_SERVER_SOCKET SPIFFE_ENDPOINT_SOCKET
ASSAY_SERVER_SOCKET=$(field server_socket)
SPIFFE_ENDPOINT_SOCKET=$(field endpoint_socket)
assay agent list

say "2. An identity for processes of this user on this node, fetched through the agent's socket."
assay entry create --parent-id "$agent" --spiffe-id spiffe://example.org/demo --selector "unix:uid:$(id -u)"
assay svid fetch --dir "$dir/svid"

say "3. Verified: by Assay's own rules and go-spiffe, and by OpenSSL if it is here."
assay svid verify --svid "$dir/svid/svid.pem" --bundle "$dir/svid/bundle.pem"
if command -v openssl >/dev/null; then
	openssl verify -purpose sslclient -CAfile "$dir/svid/bundle.pem" -untrusted "$dir/svid/svid.pem" "$dir/svid/svid.pem" |
		sed "s#$dir/svid/##"
else
	echo "(openssl is not installed)"
fi

say "4. A client waits without an identity; an entry is created; how long until it has its SVID?"
assay entry list -o json | tr ',' '\n' | sed -n 's/.*"id":"\([^"]*\)".*/\1/p' | while read -r id; do
	assay entry delete "$id" >/dev/null
done
assay wait --all-agents >/dev/null # or the client may still get the first identity
assay svid watch --count 1 -o json >"$dir/watch.json" 2>"$dir/watch.log" &
watcher=$!
pids+=("$watcher")
sleep 0.5
begin=$(date +%s%N)
assay entry create --parent-id "$agent" --spiffe-id spiffe://example.org/late --selector "unix:uid:$(id -u)" >/dev/null
until_true 30 test -s "$dir/watch.json"
wait "$watcher"
grep -q spiffe://example.org/late "$dir/watch.json"
end=$(date -d "$(sed -n 's/.*"time":"\([^"]*\)".*/\1/p' "$dir/watch.json")" +%s%N)
echo "spiffe://example.org/late reached the waiting client $(((end - begin) / 1000000)) ms after the command to create it was typed"

say "5. Renewal at half of the ten seconds, with a new key each time."
assay svid watch --count 3

say "Done. Nothing of this is left behind."
