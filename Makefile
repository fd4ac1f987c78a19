# `make help` lists what there is. Everything a target needs is fetched or built by it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

export TUNELOOP_T0 := $(shell date +%s)
# CLUSTER=current uses the current kubectl context instead of the local cluster.
export CLUSTER ?= local
# Where the environment forbids it, each of the many processes of a test run compiles torch, transformers and ours anew.
export PYTHONDONTWRITEBYTECODE :=

STEP := dev/step
KUBE := dev/cluster/cluster
PY := .venv/bin/python
PYTEST := .venv/bin/pytest
# Steps that are empty where the current context is used.
IF_LOCAL = $(if $(filter current,$(CLUSTER)),,$(1))
# In test runs: the local cluster's kubectl and helm, and where it is.
WITH_CLUSTER = eval "$$($(KUBE) env)"

.PHONY: help
help: ## this list
	@echo "make TARGET [CLUSTER=current]"
	sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 18

.PHONY: demo
demo: venv $(call IF_LOCAL,cluster-up images) $(if $(call IF_LOCAL,x),,tools) ## the whole loop, live: train, serve, drift, retrain, roll out
	@$(call IF_LOCAL,$(WITH_CLUSTER))
	export PATH="$$PATH:$$($(KUBE) bin)"
	TQDM_DISABLE=1 $(PY) -m dev.demo

.PHONY: test
test: venv postgresql s3 health control-plane-up cluster-up images ## test-unit, test-servers, test-training, test-cluster and test-e2e in one run
	@$(WITH_CLUSTER)
	$(PYTEST) -m "not long" tests/unit tests/training tests/cluster tests/e2e

.PHONY: test-unit
test-unit: venv ## no cluster, no network, no server; less than a minute
	@OMP_NUM_THREADS=1 $(PYTEST) -n 3 --dist loadfile -m "not long and not postgresql and not process" tests/unit

.PHONY: test-servers
test-servers: venv postgresql ## gateway and launcher as processes, and the store on a PostgreSQL of its own; a minute
	@$(PYTEST) -m "not long and (postgresql or process)" tests/unit

.PHONY: test-training
test-training: venv ## real training: every objective, killed, hanging, without a store; about two minutes
	@OMP_NUM_THREADS=1 $(PYTEST) -m "not long" tests/training

.PHONY: test-cluster
test-cluster: venv control-plane-up ## on a real API server without a node; about 4 minutes
	@export PATH="$$($(KUBE) bin):$$PATH"
	OMP_NUM_THREADS=1 $(PYTEST) -n 3 --dist loadgroup -m "not long" tests/cluster

.PHONY: test-e2e
test-e2e: venv cluster-up images ## the loop on real pods; about 25 minutes
	@$(WITH_CLUSTER)
	$(PYTEST) -m "not long" tests/e2e

.PHONY: test-long
test-long: venv postgresql control-plane-up cluster-up images ## what takes longer than the others together
	@$(WITH_CLUSTER)
	$(PYTEST) -m long tests

.PHONY: lint
lint: venv ## ruff, mypy, import-linter
	@.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

.PHONY: generate
generate: venv ## CRDs, their chart templates and the API's reference, from the pydantic models; dashboards from dev/dashboards
	@.venv/bin/tuneloop crds --out crds
	.venv/bin/tuneloop crds --chart --out charts/tuneloop/templates/crds
	.venv/bin/tuneloop crds --reference docs/reference/api.md
	$(PY) -m dev.dashboards

.PHONY: verify
verify: generate ## generate, then fail if that changed anything
	@changed=$$(git status --porcelain -- crds charts docs/reference)
	if [ -n "$$changed" ]; then echo "generated files differ; commit what make generate wrote:"; echo "$$changed"; exit 1; fi

.PHONY: cluster-up
cluster-up: ## the local Kubernetes, with registry and Prometheus
	@$(STEP) "Kubernetes on this machine" $(KUBE) up

.PHONY: cluster-down
cluster-down: ## stop it; objects, volumes and images are kept
	@$(KUBE) down

.PHONY: images
images: venv cluster-up ## build operator, gateway, trainer and vllm-cpu, and load them into the local cluster
	@$(STEP) "Images" dev/images/build --load

.PHONY: chart
chart: tools ## lint the chart and package it into build/
	@export PATH="$$($(KUBE) bin):$$PATH"
	helm lint --strict charts/tuneloop
	helm package charts/tuneloop -d build

.PHONY: bench
bench: bench-operator bench-start bench-gateway bench-estimate bench-training bench-checkpoints bench-drift bench-rollout ## all benchmarks

.PHONY: bench-operator
bench-operator: venv control-plane-up ## objects a second, memory, writes when idle and after a restart
	@export PATH="$$($(KUBE) bin):$$PATH"
	$(PY) -m bench.operator

.PHONY: bench-start
bench-start: venv control-plane-up ## what the operator adds between kubectl apply and the first training step
	@export PATH="$$($(KUBE) bin):$$PATH"
	$(PY) -m bench.start

.PHONY: bench-training
bench-training: venv ## training speed beside TRL, LLaMA-Factory, axolotl and KAITO; about 25 minutes
	@$(PY) -m bench.training

.PHONY: bench-estimate
bench-estimate: venv ## how far the memory estimate is from what training takes
	@$(PY) -m bench.estimate

.PHONY: bench-checkpoints
bench-checkpoints: venv ## how long a training stands still for a checkpoint, published before the next step or beside it
	@$(PY) -m bench.checkpoints

.PHONY: bench-drift
bench-drift: venv ## how often drift is reported where there is none
	@$(PY) -m bench.drift

.PHONY: bench-rollout
bench-rollout: venv ## how often a good canary is stopped, and how soon a worse one is
	@$(PY) -m bench.rollout

.PHONY: bench-gateway
bench-gateway: venv ## what the gateway adds to a request, beside LiteLLM and production-stack
	@$(PY) -m bench.gateway

.PHONY: bench-load
bench-load: venv postgresql ## 1,000 requests/s through all that ends gateways and engines: how many fail
	@$(PY) -m bench.load

.PHONY: bench-gateway-limits
bench-gateway-limits: venv postgresql ## what limits by key, shared in PostgreSQL, add to that
	@$(PY) -m bench.gateway_limits

# --- steps of the targets above ---

.PHONY: venv postgresql s3 health control-plane-up tools
venv:
	@$(STEP) "Python environment" dev/venv

postgresql:
	@$(STEP) "Debian's PostgreSQL" dev/postgresql install

control-plane-up:
	@$(STEP) "control plane for tests" $(KUBE) up --control-plane-only

s3:
	@$(STEP) "S3 server for tests" dev/s3 install

health:
	@$(STEP) "kstatus and Argo CD's Lua" dev/health/health install

tools:
	@$(STEP) "kubectl and helm" $(KUBE) tools
