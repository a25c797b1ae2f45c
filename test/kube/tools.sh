#!/usr/bin/env bash
# Builds the programs that the Kubernetes tests run, at the versions pinned under
# test/tools. That takes minutes, so it is done once per machine: they are kept in
# the user's cache by their version and Go's, and linked into DIR.
#
# usage: test/kube/tools.sh DIR NAME...    NAME: etcd, kube-apiserver, kwok, helm or istio
set -euo pipefail
cd "$(dirname "$0")/../.."

cache=${XDG_CACHE_HOME:-$HOME/.cache}/assay/tools
go=$(go env GOVERSION)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
shift
export CGO_ENABLED=0

# provide NAME PINS MODULE PACKAGE links the program NAME, which is PACKAGE of
# MODULE at the version that test/tools/PINS says.
provide() {
	local name=$1 pins=test/tools/$2 module=$3 package=$4 flags='-s -w' version kept
	version=$(awk -v module="$module" '$1 == module { print $2 }' "$pins/go.mod")
	kept=$cache/$name-$version-$go
	if [[ ! -x $kept/$name ]]; then
		echo "building $name $version with $go into $kept: once, and it takes a while" >&2
		trap 'echo "$0: $name was not built. Go has to reach its module proxy this once (go env GOPROXY)" >&2' EXIT
		if [[ $name == kube-apiserver ]]; then
			# Without its version it doesn't know which APIs it has.
			local to=k8s.io/component-base/version minor=${version#*.}
			flags+=" -X $to.gitVersion=$version -X $to.gitMajor=${version:1:1} -X $to.gitMinor=${minor%%.*}"
		fi
		mkdir -p "$kept"
		# Under another name first, so that nobody finds half a program.
		go -C "$pins" build -trimpath -ldflags "$flags" -o "$kept/$name.$$" "$package"
		if [[ $name == kwok ]]; then
			# What it does with nodes and pods lies beside its source.
			(cd "$(go -C "$pins" list -m -f '{{.Dir}}' "$module")/kustomize/stage" &&
				awk 'FNR == 1 { print "---" } 1' node/fast/node-*.yaml node/heartbeat/node-*.yaml pod/fast/pod-*.yaml) >"$kept/stages.yaml"
		fi
		if [[ $name == pilot-discovery ]]; then
			# Its charts as well.
			cp -r "$(go -C "$pins" list -m -f '{{.Dir}}' "$module")/manifests/charts" "$kept/"
			chmod -R u+w "$kept/charts"
		fi
		mv "$kept/$name.$$" "$kept/$name"
		trap - EXIT
	fi
	ln -sfn "$kept/$name" "$dir/$name"
}

for name; do
	case $name in
	etcd) provide etcd etcd go.etcd.io/etcd/server/v3 go.etcd.io/etcd/server/v3 ;;
	kube-apiserver) provide kube-apiserver kube k8s.io/kubernetes k8s.io/kubernetes/cmd/kube-apiserver ;;
	helm) provide helm helm helm.sh/helm/v4 helm.sh/helm/v4/cmd/helm ;;
	istio)
		provide pilot-agent istio istio.io/istio istio.io/istio/pilot/cmd/pilot-agent
		provide pilot-discovery istio istio.io/istio istio.io/istio/pilot/cmd/pilot-discovery
		ln -sfn "$(dirname "$(readlink -f "$dir/pilot-discovery")")/charts" "$dir/istio-charts"
		;;
	kwok) provide kwok kwok sigs.k8s.io/kwok sigs.k8s.io/kwok/cmd/kwok ;;
	*) echo "$0: there is no $name" >&2; exit 64 ;;
	esac
done
