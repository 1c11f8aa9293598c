# One command on a bare machine: `make quickstart` or `make test`. Needs only Python 3.11-3.13 and a package index.
SHELL := /bin/bash
.PHONY: help quickstart test test-numerics check docs dist dist-check install clean

# The pinned set is tested on 3.11, so that comes first. Another one: make test PYTHON=/path/to/python3.12
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; \
	then command -v $$p; break; fi; done)
VENV ?= .venv
# Used only where there is no NVIDIA GPU and only when it answers: torch without the CUDA libraries (0.2 GB, not 3 GB).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
WORKERS ?= 2
TESTS ?= tests
# What rounds and draws, and takes a few minutes: run on the oldest instructions and with other seeds by test-numerics.
NUMERICS ?= tests/vlm tests/generation tests/algorithms
SHIFT ?= 1

help:
	@echo "make quickstart   train, align, guard and report the demo on this machine's CPU"
	@echo "make test         run the tests (TESTS=tests/cli picks some, WORKERS=4 runs more at once)"
	@echo "make test-numerics   the numerical tests again, on the processor's oldest instructions and with seeds shifted by SHIFT"
	@echo "make check        ruff and mypy"
	@echo "make docs         the docs as a site, in build/site; broken links and names are errors"
	@echo "make dist         source archive and wheel, in dist/"
	@echo "make dist-check   init and a tiny quickstart from the wheel, in an empty folder"
	@echo "make install      only set up $(VENV)"
	@echo "make clean        remove $(VENV), caches and build output"

quickstart: $(STAMP)
	$(VENV)/bin/safe-rlhf-v quickstart

test: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n $(WORKERS) $(TESTS)

test-numerics: $(STAMP)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(MAKE) test TESTS="--shift-seeds $(SHIFT) $(NUMERICS)"

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The site's sources lie as they do in the repository, so one relative link holds here and there.
docs: $(VENV)/.docs
	rm -rf build/site build/site-source && mkdir -p build/site-source
	for name in README.md CHANGELOG.md CONTRIBUTING.md LICENSE docs examples configs safe_rlhf_v; do \
		ln -s ../../$$name build/site-source/$$name; done
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict -f docs/mkdocs.yml
	@echo "open build/site/index.html, or with its search: $(VENV)/bin/python -m http.server -d build/site"

dist: $(VENV)/.dist
	rm -rf dist && $(VENV)/bin/python -m build --no-isolation

dist-check: dist
	bash .ci/dist-check $(VENV) dist/*.whl

# What only these two need is installed when they are asked for.
$(VENV)/.docs $(VENV)/.dist: $(VENV)/.%: $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e ".[$*]"
	@touch $@

install: $(STAMP)

# torch goes first and alone: resolved with the rest, an index may offer a build for other hardware.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11, 3.12 or 3.13 with venv found; install one (Debian: apt install python3 python3-venv)"; \
		echo "       or name it: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3.11"; exit 1; fi
	@set -e; \
	[ -x $(VENV)/bin/python ] || "$(PYTHON)" -m venv $(VENV); \
	pin=$$(grep '^torch==' constraints.txt); index=; \
	if ! nvidia-smi >/dev/null 2>&1 && [ -n "$(TORCH_INDEX)" ]; then \
		if $(VENV)/bin/python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$(TORCH_INDEX)/torch/" >/dev/null 2>&1; \
		then index="--extra-index-url $(TORCH_INDEX)"; \
		else echo "$(TORCH_INDEX) does not answer; taking $$pin from the configured package index"; fi; fi; \
	echo "installing $$pin, then the rest"; \
	$(PIP) install --quiet $$index "$$pin"; \
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"; \
	if $(PIP) show --quiet torchvision >/dev/null 2>&1; then echo "error: something pulled in torchvision"; exit 1; fi
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
