# Every target makes what it needs, in $(VENV). Settings: PYTHON (3.10 or later), VENV, CC, BUILD.
#   make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV   ?= .venv
BUILD  ?= build

AARCH64_CC ?= aarch64-linux-gnu-gcc
QEMU       ?= qemu-aarch64

PIP         = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
C_SOURCES   = $(wildcard csrc/*.[ch]) csrc/cflags
C_WARNINGS  = -Wall -Wextra
C_TESTS     = $(patsubst tests/c/%.c,%,$(wildcard tests/c/*.c))
C_FORMATTED = $(wildcard csrc/*.[ch] tests/c/*.[ch] tests/crash/*.[ch] examples/*.c)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-py test-c test-aarch64 lint format lib build bench clean

help: ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "%-15s%s\n", $$1, $$2}'

demo: $(VENV)/.demo ## see it: gunicorn with 4 workers and one limit; ends by itself, leaves nothing
	@$(VENV)/bin/python examples/demo/run.py

test: test-c test-py ## run all tests: C, then Python

test-py: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n auto -q

test-c: $(C_TESTS:%=run-c-%) ## run the C tests: each tests/c/*.c is a program

test-aarch64: $(C_TESTS:%=run-aarch64-%) ## run the C tests as aarch64 under qemu (optional: needs both)

lint: $(VENV)/.lint ## ruff, mypy --strict, clang-format, and the compiler's warnings as errors
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FORMATTED)
	$(CC) @csrc/cflags $(C_WARNINGS) -Werror -fsyntax-only csrc/unity.c

format: $(VENV)/.lint ## rewrite Python and C in the house's format
	$(VENV)/bin/ruff check --fix-only
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(C_FORMATTED)

lib: $(BUILD)/libfast_shm.so ## build/libfast_shm.so, for any language; its header is csrc/fast_shm.h

build: $(VENV)/.build ## dist/: the sdist, and the wheel for CPython 3.10 and later
	$(VENV)/bin/python -m build

bench: $(VENV)/.bench ## measure, beside the peers, in one run
	$(VENV)/bin/python -m bench

clean: ## remove everything that was made here, .venv included
	rm -rf $(BUILD) dist .venv .venv-* *.egg-info fast_litellm_shm/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Virtual environments. $(VENV)/.NAME: the package is installed there, editable, with the extra NAME.
# Python sources are read where they are; the rest asks for a new installation when it changes.

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "there is no $(PYTHON): install Python 3.10 or later, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10: say make PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, os, sysconfig, sys; \
	  sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || \
	  { echo "$(PYTHON) lacks venv or its C headers: apt-get install python3-venv python3-dev"; exit 1; }
	@command -v $(firstword $(CC)) >/dev/null || \
	  { echo "there is no C compiler ($(CC)): install gcc or clang, or say make CC=..."; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.%: $(VENV)/.made $(C_SOURCES) csrc/build.py setup.py pyproject.toml
	@echo "installing fast_litellm_shm and what '$*' needs into $(VENV)"
	@$(PIP) install --editable '.[$*]'
	@touch $@

# C

$(BUILD)/libfast_shm.so: $(C_SOURCES)
	@mkdir -p $(@D)
	$(CC) @csrc/cflags $(C_WARNINGS) -fPIC -shared -Icsrc -include csrc/exports.h csrc/unity.c -o $@ $(LDFLAGS)

.PRECIOUS: $(BUILD)/c/% $(BUILD)/aarch64/% # make would take them for intermediate, and delete them

$(BUILD)/c/%: tests/c/%.c $(wildcard tests/c/*.h) $(C_SOURCES)
	@mkdir -p $(@D)
	$(CC) @csrc/cflags $(C_WARNINGS) -Icsrc -Itests/c $< -o $@ -pthread $(LDFLAGS)

run-c-%: $(BUILD)/c/%
	$<

# Static, so that qemu needs no aarch64 system around it.
$(BUILD)/aarch64/%: tests/c/%.c $(wildcard tests/c/*.h) $(C_SOURCES)
	@command -v $(AARCH64_CC) >/dev/null && command -v $(QEMU) >/dev/null || \
	  { echo "needs $(AARCH64_CC) and $(QEMU): apt-get install gcc-aarch64-linux-gnu qemu-user"; exit 1; }
	@mkdir -p $(@D)
	$(AARCH64_CC) @csrc/cflags $(C_WARNINGS) -Icsrc -Itests/c $< -o $@ -static -pthread

run-aarch64-%: $(BUILD)/aarch64/%
	$(QEMU) $<
