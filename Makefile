# Everything one does with this repository. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PROTOS := $(shell find protos/mesh -name '*.proto' | sort)
ENVOY := $(shell cd protos/third_party && find envoy -name '*.proto' | sort)
CODE := services tenantry devstack bench deploy tests docs
# Processes that share the tests out among them.
WORKERS ?= 2
TOOLS := $(CURDIR)/.tools
GRPCURL_VERSION := v1.9.3
KUBECONFORM_VERSION := v0.7.0
KUSTOMIZE_VERSION := v5.7.1

export PATH := $(CURDIR)/$(BIN):$(TOOLS):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install run demo certs test test-all lint format types imports proto proto-check proto-breaking mutation chaos bench k8s-check tools lock ci clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(INSTALLED): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: install it, or run make with PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Run make with PYTHON=/path/to/python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv; $(PYTHON) -m venv .venv; } || { rm -rf .venv; \
	  echo "The environment cannot be made. On Debian: apt install python3-venv"; exit 1; }
	@echo "installing the locked dependencies"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-bootstrap.lock
	@$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

install: $(INSTALLED) ## make the environment and install the locked dependencies

run: $(INSTALLED) ## start the whole mesh here, show one call, stay up until Ctrl-C (TLS=1: all of it on mutual TLS)
	@exec $(BIN)/python -m devstack run $(if $(TLS),--tls)

demo: $(INSTALLED) ## tell and verify the story of two tenants (JSON=1 for one JSON object; TLS=1)
	@exec $(BIN)/python -m devstack demo $(if $(JSON),--json) $(if $(TLS),--tls)

certs: $(INSTALLED) ## make the development certificates, or renew those near their end
	@$(BIN)/python -m devstack certs

test: $(INSTALLED) ## run the tests against real stores, without the slow ones (WORKERS= processes, 2)
	@$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

test-all: $(INSTALLED) ## run the tests, the slow ones too
	@$(BIN)/python -m pytest -q -n $(WORKERS)

lint: $(INSTALLED) ## check the style of code and contracts
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/buf lint

format: $(INSTALLED) ## format code and contracts
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/buf format -w --path protos/mesh

types: $(INSTALLED) ## check types
	@$(BIN)/mypy

imports: $(INSTALLED) ## check which room may import which
	@$(BIN)/lint-imports

proto: $(INSTALLED) ## generate the stubs of protos/ into protos/gen
	@rm -rf .stubs && mkdir .stubs
	@$(BIN)/python -m grpc_tools.protoc -I protos -I protos/third_party --python_out=.stubs --grpc_python_out=.stubs \
	  --mypy_out=quiet:.stubs --mypy_grpc_out=quiet,only_async:.stubs $(PROTOS)
	@$(BIN)/python -m grpc_tools.protoc -I protos/third_party --python_out=.stubs --mypy_out=quiet:.stubs buf/validate/validate.proto
	@$(BIN)/python -m grpc_tools.protoc -I protos -I protos/third_party --python_out=.stubs --grpc_python_out=.stubs \
	  --mypy_out=quiet:.stubs --mypy_grpc_out=quiet,only_async:.stubs $(ENVOY)
	@rm -rf protos/gen && mv .stubs protos/gen

proto-breaking: $(INSTALLED) ## fail when the contracts break callers of the last release
	@released=$$(git describe --tags --abbrev=0 2>/dev/null); \
	  if [ -z "$$released" ]; then echo "no release is tagged yet: there is nothing to break"; else $(BIN)/buf breaking --against ".git#ref=$$released"; fi

proto-check: proto ## fail when the checked-in stubs differ from their contracts
	@git diff --exit-code --stat -- protos/gen || { echo "protos/gen does not match protos/: run 'make proto' and commit the result"; exit 1; }
	@test -z "$$(git ls-files --others --exclude-standard protos/gen)" || { echo "protos/gen has stubs that are not committed"; exit 1; }

mutation: $(INSTALLED) ## take one wall down at a time and see that the isolation suite notices (about 20 s each)
	@$(BIN)/python -m tests.isolation.mutation $(if $(ONLY),--only '$(ONLY)' --skip-unchanged)

chaos: $(INSTALLED) ## kill a part of a loaded mesh every other second for DURATION (60) s, then compare all ledgers (SEED=…)
	@exec $(BIN)/python -m tests.chaos --duration $(or $(DURATION),60) $(if $(SEED),--seed $(SEED))

bench: $(INSTALLED) ## measure a call's overhead over the bare provider (one JSON object last)
	@$(BIN)/python -m bench call_overhead

k8s-check: $(INSTALLED) tools ## build and validate the manifests, and hold them against the settings (needs Go)
	@$(BIN)/python -m deploy.check

tools: ## install the optional command-line tools into .tools (needs Go)
	@command -v go >/dev/null || { echo "go is not installed: tests that need grpcurl, kubeconform or kustomize are skipped"; exit 0; }; \
	  mkdir -p $(TOOLS); \
	  test -x $(TOOLS)/grpcurl || GOBIN=$(TOOLS) go install github.com/fullstorydev/grpcurl/cmd/grpcurl@$(GRPCURL_VERSION); \
	  test -x $(TOOLS)/kubeconform || GOBIN=$(TOOLS) go install github.com/yannh/kubeconform/cmd/kubeconform@$(KUBECONFORM_VERSION); \
	  test -x $(TOOLS)/kustomize || GOBIN=$(TOOLS) go install sigs.k8s.io/kustomize/kustomize/v5@$(KUSTOMIZE_VERSION)
	@command -v pgbouncer >/dev/null || test -x /usr/sbin/pgbouncer || { \
	  if test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get install -y -qq pgbouncer >/dev/null 2>&1; then echo "pgbouncer is installed"; \
	  else echo "pgbouncer is not installed: tests that go through it are skipped (on Debian: apt install pgbouncer)"; fi; }

lock: ## resolve the dependencies again into requirements.lock
	@$(BIN)/uv pip compile -q --universal --generate-hashes --all-extras --no-annotate --no-header pyproject.toml -o requirements.lock
	@$(BIN)/uv pip compile -q --universal --generate-hashes --no-annotate --no-header -c requirements.lock pyproject.toml -o deploy/requirements-runtime.lock
	@echo "uv==0.13.8" | $(BIN)/uv pip compile -q --universal --generate-hashes --no-annotate --no-header - -o requirements-bootstrap.lock

ci: $(INSTALLED) tools lint types imports proto-check proto-breaking k8s-check ## everything a change must pass
	@$(MAKE) --no-print-directory test-all

clean: ## remove what was built, and the state of the embedded stack
	rm -rf .venv .tools .tenantry .stubs .import_linter_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
