#!/usr/bin/env bash
# A day's work of an operator, by script: the assay command with -o json, and jq.
# It checks what each command prints and how it exits.
#
# Usage: operator.sh AGENT_ID OTHER_AGENT_ID
#
# ASSAY_SERVER_SOCKET names the server; both agents are connected to it, and
# SPIFFE_ENDPOINT_SOCKET is the first one's. At the end the second is gone.
set -euo pipefail

agent=$1 other=$2
unset ASSAY_SERVER # one over the network would be another server
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=$work/out err=$work/err

fail() {
	echo "operator.sh, line ${BASH_LINENO[1]}: $*" >&2
	sed 's/^/  stdout: /' "$out" >&2
	sed 's/^/  stderr: /' "$err" >&2
	exit 1
}

# run CODE ARGUMENTS...: assay has to exit with CODE.
run() {
	local want=$1 code=0
	shift
	assay "$@" -o json >"$out" 2>"$err" </dev/null || code=$?
	((code == want)) || fail "assay $* exited with $code, not with $want"
	# What is refused says why, in one line of JSON, on standard error.
	((code == 0)) || [[ $(jq -r .error.reason <"$err") != null ]] || fail "assay $* does not say why it failed"
}

# is FILTER VALUE: what assay printed.
is() {
	local got
	got=$(jq -r "$1" <"$out") || fail "$1 is not there"
	[[ $got == "$2" ]] || fail "$1 is $got, not $2"
}

# because REASON: why assay failed.
because() {
	[[ $(jq -r .error.reason <"$err") == "$1" ]] || fail "the reason is not $1"
}

echo "- the state of things"
run 0 status
is .trust_domain example.org
is .agent_counts.connected 2
is .agent_counts.banned 0
is .entries 0
is '.authorities | length' 1
is '.authorities[0].state' active
pin=$(jq -r '.authorities[0].pin' <"$out")
sequence=$(jq -r .bundle_sequence <"$out")
run 69 status --socket "$work/nobody.sock"
because unreachable
run 0 version

echo "- a token for a new node"
run 0 token create --ttl 5m
is .pin "$pin"
token=$(jq -r .token <"$out")
((${#token} >= 26)) || fail "the token is short"
[[ $(jq -r .agent_id <"$out") == spiffe://example.org/assay/agent/join_token/* ]] || fail "the agent's ID is not told"
run 64 token create --ttl 0s
run 65 token create --ttl 1000h
because ttl_out_of_range

echo "- the nodes"
run 0 agent list
is '.agents | length' 2
is '.agents[0].connected' true
is '.agents[1].attestor' join_token
run 0 agent list --attestor join_token --banned=false --can-reattest=false --expires-before 24h
is '.agents | length' 2
run 0 agent list --expires-before 0s
is '.agents | length' 0
run 64 agent list --match exact
run 0 agent show "$agent"
is .id "$agent"
is .banned false
run 69 agent show spiffe://example.org/assay/agent/join_token/none
because agent_unknown
run 65 agent show none
because spiffe_id_invalid

echo "- identities"
web=(--parent-id "$agent" --selector "unix:uid:$(id -u)" --spiffe-id spiffe://example.org/web)
run 0 entry create "${web[@]}" --hint web --ttl 30m
id=$(jq -r .id <"$out")
is .revision 0
is .x509_svid_ttl_seconds 1800
run 75 entry create "${web[@]}"
because entry_exists
is .id "$id"
run 65 entry create --parent-id "$agent" --selector unix:uid:1 --spiffe-id spiffe://example.org/assay/server
because spiffe_id_invalid
run 64 entry create --parent-id "$agent" --spiffe-id spiffe://example.org/none
for n in 1 2 3; do
	run 0 entry create --parent-id "$other" --selector "unix:uid:$n" --selector unix:gid:7 --spiffe-id "spiffe://example.org/job/$n" --id "job-$n"
done
run 0 entry list
is '.entries | length' 4
run 0 entry list --parent-id "$other" --selector unix:gid:7
is '.entries | length' 3
is '.entries[1].spiffe_id' spiffe://example.org/job/2
is '.entries[1].selectors | length' 2
run 0 entry list --selector unix:gid:7 --match exact
is '.entries | length' 0
run 0 entry list --selector unix:gid:7 --selector unix:uid:3 --match subset
is '.entries[0].id' job-3
run 0 entry list --selector unix:uid:1 --selector unix:uid:2 --match any
is '.entries | length' 2
run 0 entry list --spiffe-id spiffe://example.org/web --hint web
is '.entries[0].id' "$id"
run 0 entry count --parent-id "$other"
is .count 3
run 0 entry count --hint nobody
is .count 0
run 0 entry show job-3
is .parent_id "$other"
run 69 entry show none
because entry_unknown
run 0 entry update "$id" --ttl 15m --dns web.example.org
is .revision 1
is .x509_svid_ttl_seconds 900
is '.dns_names[0]' web.example.org
is .hint web
run 64 entry update "$id"
run 69 entry update none --ttl 15m
run 0 svid fetch --hint web
is '.svids[0].spiffe_id' spiffe://example.org/web

echo "- identities from a file"
assay entry list --parent-id "$other" -o json >"$work/entries.json"
run 0 entry delete job-1 job-2
is '.results | length' 2
is '.results[0].error' null
run 69 entry delete job-1 job-3 none
is '.results[0].error.reason' entry_unknown
is '.results[1].error' null
run 0 entry count --parent-id "$other"
is .count 0
run 0 entry apply -f "$work/entries.json" --dry-run
run 0 entry count --parent-id "$other"
is .count 0
run 0 entry apply -f "$work/entries.json"
run 0 entry list --parent-id "$other"
is '.entries | length' 3
is '.entries[0].id' job-1

echo "- a node that was taken over, and one that is gone"
run 64 agent ban "$other" # nobody to ask, and no --yes
run 0 agent show "$other"
is .banned false
run 0 agent ban --yes "$other"
run 0 agent list --banned
is '.agents | length' 1
is '.agents[0].id' "$other"
run 0 agent show "$other"
is .banned true
run 0 status
is .agent_counts.banned 1
is .agent_counts.total 1
run 69 agent ban --yes "$other" spiffe://example.org/assay/agent/join_token/none
is '.results[0].error' null
is '.results[1].error.reason' agent_unknown
run 0 agent purge --dry-run
is '.results | length' 0
run 0 agent evict --yes "$other"
run 69 agent show "$other"
run 69 agent evict --yes "$other"
run 0 agent list
is '.agents | length' 1
run 0 entry delete job-1 job-2 job-3

echo "- what others verify with"
run 0 bundle show
is .sequence "$sequence"
is .trust_domain example.org
is '.x509_authorities | length' 1
is '.x509_authorities[0].tainted' false
run 0 bundle show --format spiffe
is '.keys | length' 1
is '.keys[0].use' x509-svid
is .spiffe_sequence "$sequence"
assay bundle show >"$work/bundle.pem"
run 0 svid fetch --dir "$work/svid" --hint web
run 0 svid verify --svid "$work/svid/svid.pem" --bundle "$work/bundle.pem" --id spiffe://example.org/web

echo "- the end of the day"
run 0 status
is .entries 1
is .agent_counts.connected 1
is .bundle_sequence "$sequence"
echo "done"
