# Assay. `make demo` and `make test` need nothing but Go, git and make (and gcc
# for the race detector). Tools run at the versions pinned under test/tools.

GO      ?= go
OUT     := out
BIN     := bin
TOOLS   := $(OUT)/tools
# Without gRPC's trace pages, which nothing here serves: they use templates, for
# which the linker keeps every method of every type, Envoy's checks of its whole
# configuration among them.
TAGS    := grpcnotrace
export CGO_ENABLED ?= 0

# What the race detector needs; everything else is built without cgo.
RACE    := CGO_ENABLED=1 $(GO) test -race

.PHONY: build images images-check demo test test-kube test-istio check bench conformance generate generate-check released manifests manifests-check docs zlint alerts lint fmt long fuzz clean
build: ## the three static binaries, into bin/
	$(GO) build -tags $(TAGS) -trimpath -ldflags '-s -w' -o $(BIN)/ ./cmd/...

# No daemon and no base image: a program of ours puts static binaries into OCI
# archives. VCS information is asked for, since versions and labels come from it.
ARCHS   ?= amd64 arm64
IMAGES  := $(OUT)/images
images: $(TOOLS)/image ## OCI images of server and agent, for ARCHS; REPOSITORY and TAG name them
	for arch in $(ARCHS); do GOOS=linux GOARCH=$$arch $(GO) build -buildvcs=auto -tags $(TAGS) -trimpath -ldflags '-s -w' -o $(IMAGES)/linux-$$arch/ ./cmd/... || exit; done
	$(TOOLS)/image -o $(IMAGES) $(addprefix -repository=,$(REPOSITORY)) $(addprefix -tag=,$(TAG)) $(ARCHS:%=$(IMAGES)/linux-%)

images-check: images ## the same sources give the same bytes
	rm -rf $(OUT)/images-again
	$(MAKE) images IMAGES=$(OUT)/images-again
	cmp $(IMAGES)/assay-server.tar $(OUT)/images-again/assay-server.tar
	cmp $(IMAGES)/assay-agent.tar $(OUT)/images-again/assay-agent.tar

demo: build ## attest a node, attest a process, deliver and renew its SVID
	@test/demo.sh $(BIN)

# Other users and namespaces can be played by root alone: those tests are built
# with the tag root, which CI has.
ROOT    := $(if $(filter 0,$(shell id -u)),root)

test: need-gcc ## unit tests with the race detector, then end to end through the real binaries
	@$(if $(ROOT),,echo 'make: not root, so without the tests that act as other users')
	$(RACE) -tags '$(ROOT)' -timeout 20m ./...
	$(RACE) -tags 'e2e $(ROOT)' -count=1 -timeout 20m ./test/e2e/...

test-kube: need-gcc $(if $(ROOT),$(TOOLS)/image) ## against a real Kubernetes API, built before the first run on a machine
	test/kube/tools.sh $(OUT)/kube etcd kube-apiserver kwok helm
	$(RACE) -tags 'kube $(ROOT)' -count=1 -timeout 20m ./test/kube/...

test-istio: need-gcc ## Istio's own programs against a real Kubernetes API: built before the first run on a machine
	test/kube/tools.sh $(OUT)/kube etcd kube-apiserver helm istio
	$(RACE) -tags 'kube istio $(ROOT)' -count=1 -timeout 20m -run $(call only,test/kube/*_istio_test.go) ./test/kube

# The tests of some files alone, for go test -run: those beside them have run.
only    = "^($$(sed -n 's/^func \(Test[[:alnum:]]*\).*/\1/p' $(1) | paste -sd '|'))$$"

long: need-gcc need-strace ## the suites that take longer: endurance, kill points, disk errors, PID reuse
	$(RACE) -tags 'e2e long $(ROOT)' -count=1 -timeout 30m -run $(call only,test/e2e/*_long_test.go) ./test/e2e/...
	@# Sixteen months in a bubble take a minute, with the race detector ten.
	$(GO) test -tags long -count=1 -timeout 15m -run SixteenMonths ./server/rotation
	@# With the pidfd check compiled out the same attack has to succeed, else
	@# the harness proves nothing.
	$(if $(ROOT),$(RACE) -tags 'root nopidfd' -count=1 -run Reused ./agent/attest)

check: generate-check manifests-check lint zlint alerts ## everything that must hold before a commit
	$(GO) vet ./...
	$(GO) vet -tags 'e2e kube istio bench long root' ./...
	$(MAKE) test

bench: build ## the numbers of docs/performance.md, each with its ratio to this machine's limit
	$(GO) run ./test/bench -bin $(BIN) -o docs/bench-results.md
	test/kube/tools.sh $(OUT)/kube etcd kube-apiserver kwok
	$(GO) test -tags 'kube bench' -v -count=1 -timeout 20m -run TestBench ./test/kube

conformance: ## which requirement is proven by which test; also docs/conformance.md
	$(GO) run ./test/conformance -o docs/conformance.md

generate: $(TOOLS)/buf $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc ## Go code from the .proto files
	PATH="$(abspath $(TOOLS)):$$PATH" buf format -w
	PATH="$(abspath $(TOOLS)):$$PATH" buf generate --template proto/buf.gen.yaml

# What the last release speaks. Agents, servers and tools of different releases
# meet on the wire, so generate-check holds the .proto files to it.
RELEASED := proto/released.binpb
released: $(TOOLS)/buf ## take the .proto files as released: part of a release, see CONTRIBUTING.md
	PATH="$(abspath $(TOOLS)):$$PATH" buf build --exclude-source-info -o $(RELEASED)

# Works on a dirty tree: it compares what it generates with what lies there.
generate-check: $(TOOLS)/buf $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc
	PATH="$(abspath $(TOOLS)):$$PATH" buf lint
	PATH="$(abspath $(TOOLS)):$$PATH" buf format -d --exit-code
	rm -rf $(OUT)/_generated && mkdir -p $(OUT)/_generated
	PATH="$(abspath $(TOOLS)):$$PATH" buf generate --template proto/buf.gen.yaml -o $(OUT)/_generated
	PATH="$(abspath $(TOOLS)):$$PATH" buf breaking --against $(RELEASED)
	@for f in $$(cd $(OUT)/_generated/proto && find . -name '*.go'); do \
		cmp -s "$(OUT)/_generated/proto/$$f" "proto/$$f" || { echo "proto/$$f is stale: run make generate" >&2; exit 1; }; done

zlint: build $(TOOLS)/zlint ## every kind of certificate that is made, by RFC 5280
	rm -rf $(OUT)/certificates
	$(GO) run ./test/certificates -bin $(BIN) -o $(OUT)/certificates
	$(TOOLS)/zlint $(OUT)/certificates

# A dashboard has no checker of its own: its queries are checked as rules.
alerts: $(TOOLS)/promtool ## the alert rules fire when they should, and the dashboard's queries are queries
	$(TOOLS)/promtool check rules deploy/prometheus/assay.rules.yaml
	$(TOOLS)/promtool test rules deploy/prometheus/*.test.yaml
	$(GO) run ./test/dashboard deploy/grafana/assay.json >$(OUT)/dashboard.rules.yaml
	$(TOOLS)/promtool check rules $(OUT)/dashboard.rules.yaml

# For those without helm; the values are the example's.
MANIFESTS := deploy/kubernetes/assay.yaml
MANIFEST = { echo '\# Made from deploy/helm/assay by make manifests; docs/kubernetes.md says what to change in it.' && \
	$(TOOLS)/helm template assay deploy/helm/assay --namespace assay -f deploy/helm/assay/ci/minimal.yaml | \
	sed -e '/managed-by: Helm$$/d' -e '/helm.sh\/chart: /d' -e '/^\# Source: /d' -e '/^$$/d'; }
manifests: $(TOOLS)/helm ## plain Kubernetes manifests from the chart
	$(MANIFEST) >$(MANIFESTS)

manifests-check: $(TOOLS)/helm
	@mkdir -p $(OUT) && $(MANIFEST) >$(OUT)/manifests.yaml
	@cmp $(OUT)/manifests.yaml $(MANIFESTS) || { echo '$(MANIFESTS) is stale: run make manifests' >&2; exit 1; }

docs: ## docs/reference from the source; make test says when that is due
	$(GO) test -count=1 -run Reference ./cmd/... ./test/reference -update

lint: $(TOOLS)/golangci-lint ## format and lint
	$(TOOLS)/golangci-lint fmt --diff
	$(TOOLS)/golangci-lint run --build-tags 'e2e kube istio bench long root' ./...

fmt: $(TOOLS)/golangci-lint
	$(TOOLS)/golangci-lint fmt

fuzz: ## each fuzz target for FUZZTIME: a time or a number of inputs (default 10s)
	test/fuzz.sh $(or $(FUZZTIME),10s)

clean:
	rm -rf $(OUT) $(BIN)

$(TOOLS)/buf: test/tools/buf/go.mod
	cd test/tools/buf && $(GO) build -o $(abspath $(TOOLS))/ tool
$(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc &: test/tools/gen/go.mod
	cd test/tools/gen && $(GO) build -o $(abspath $(TOOLS))/ tool
$(TOOLS)/golangci-lint: test/tools/lint/go.mod
	cd test/tools/lint && $(GO) build -o $(abspath $(TOOLS))/ tool
$(TOOLS)/zlint: test/tools/zlint/go.mod $(wildcard test/tools/zlint/*.go)
	cd test/tools/zlint && $(GO) vet . && $(GO) build -o $(abspath $(TOOLS))/ .
$(TOOLS)/image: test/tools/image/go.mod $(wildcard test/tools/image/*.go)
	cd test/tools/image && $(GO) vet . && $(GO) test . && $(GO) build -o $(abspath $(TOOLS))/ .

# Takes minutes as well: kept per machine, as for the tests that run it.
$(TOOLS)/helm: test/tools/helm/go.mod
	test/kube/tools.sh $(TOOLS) helm

# Without the plugins that find targets in clouds, which take long to build and
# check no rule.
$(TOOLS)/promtool: test/tools/promtool/go.mod
	cd test/tools/promtool && $(GO) build -tags remove_all_sd -trimpath -ldflags '-s -w' -o $(abspath $(TOOLS))/ tool

.PHONY: need-gcc need-strace
need-strace: # root's tests make system calls of the server fail
	@$(if $(ROOT),command -v strace >/dev/null || { echo 'make: root tests with disk errors need strace: apt-get install -y strace' >&2; exit 1; })

need-gcc:
	@command -v gcc >/dev/null || { echo 'make: the race detector needs gcc: apt-get install -y gcc libc6-dev' >&2; exit 1; }
