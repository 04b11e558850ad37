# Every target makes what it needs, in $(VENV). Settings: PYTHON (3.10 or later), VENV, CC, BUILD.
#   make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV   ?= .venv
BUILD  ?= build

CLANG  ?= clang
AARCH64_CC ?= aarch64-linux-gnu-gcc
QEMU       ?= qemu-aarch64

# PYTEST_ARGS: more for every run of the tests, as .ci/run has. PART=2/3: the second third of the tests.
PYTEST      = $(VENV)/bin/python -m pytest -q $(PYTEST_ARGS) $(if $(PART),--group $(subst /, --splits ,$(PART)))
BY_PIP      = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet install
INSTALL    ?= $(BY_PIP)
C_SOURCES   = $(wildcard csrc/*.[ch] csrc/*/*.[ch]) csrc/cflags csrc/hardening
C_WARNINGS  = -Wall -Wextra
# What is shipped: csrc/hardening, and what only some compilers and linkers take (csrc/build.py has the same).
TAKEN_BY_CC = $(shell for f in $(1); do $(CC) $$f -Werror -shared -fPIC -x c /dev/null -o /dev/null 2>/dev/null && echo $$f; done)
HARDENED    = @csrc/hardening $(call TAKEN_BY_CC,-fcf-protection=return -Wl$(comma)-z$(comma)relro$(comma)-z$(comma)now$(comma)-z$(comma)noexecstack)
C_TESTS     = $(patsubst tests/c/%.c,%,$(wildcard tests/c/*.c))
C_FORMATTED = $(wildcard csrc/*.[ch] csrc/*/*.[ch] $(patsubst %,tests/%/*.[ch],c c/faults crash hostile linear peers) bench/*.c examples/*.c)
# Of each: all of csrc, and what is beside it.
C_PROGRAMS  = $(wildcard tests/hostile/*.c tests/linear/*.c) tests/crash/main.c

comma := ,

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: docs docs-site test-docs site-pages apps test-apps help demo demo-litellm check check-c check-py test lint-c environments test-cluster test-limits limits-upstream test-peers peers-upstream test-dashboard dashboard-page test-spellings spellings soak test-litellm test-freethreaded test-py test-py-forks test-py-loaded python-too test-c test-aarch64 lint format lib build bench bench-proxy instructions scaling clean test-wheels wheels wheels-built wheels-tested test-free-threaded free-threaded

# The text after ## is `GROUP: what it does`.
help: ## start: list the targets
	@echo "make TARGET, where TARGET is one of"
	@awk '/^[a-z0-9-]+:.*## [a-z]+: / { \
	    name = $$0; sub(/:.*/, "", name); text = $$0; sub(/.*## /, "", text); group = text; sub(/:.*/, "", group); \
	    sub(/^[a-z]+: /, "", text); of[group] = of[group] sprintf("  %-18s%s\n", name, text) } \
	  END { n = split("start build test proofs bench", groups, " "); \
	    for (i = 1; i <= n; i++) printf "\n%s\n%s", groups[i], of[groups[i]] }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## start: gunicorn with 4 workers and one limit; ends by itself, leaves nothing
	@$(VENV)/bin/python examples/demo/run.py

demo-litellm: $(VENV)/.litellm-proxy ## start: LiteLLM's proxy with 4 workers, with the plugin and without; 1 to 2 minutes
	@$(VENV)/bin/python examples/litellm_proxy/run.py

# What a first change needs: about two minutes on two cores, once everything is installed. The C tests are built at -O1
# (half the time of -O3), with a tenth of their random histories; left out are those of races, of stories and of clocks.
CHECK_C  = $(filter-out $(addprefix test_,stories turns threads flood older bounded clock budget_kills),$(C_TESTS))
CHECK_PY = $(addprefix tests/,test_limits.py test_api_names.py test_docstrings.py limiters/test_rate.py limiters/test_quota.py \
  limiters/test_concurrency.py limiters/test_batch.py limiters/test_decorators.py limiters/test_block.py pools/test_pool.py \
  routing/test_routing.py shared/test_segment.py shared/test_errors.py shared/test_settings.py shared/test_features.py \
  shared/test_inspection.py cli/test_inspect.py cli/test_ls.py metrics/test_snapshot.py metrics/test_prometheus_text.py \
  integrations/web/test_gate.py integrations/web/test_keys.py integrations/web/test_paths.py packaging/test_docs.py)
check: lint check-c check-py ## start: what a first change needs, in about 2 minutes: lint, the fast C and Python tests

check-c:
	@CHECK_FEWER=1 $(MAKE) --no-print-directory -j$(CORES) BUILD=$(BUILD)/check CFLAGS=-O1 $(CHECK_C:%=run-c-%)

check-py: $(VENV)/.test
	$(PYTEST) -n auto $(CHECK_PY)

test: test-c test-py ## test: all tests of C and Python that need no server of their own

# What loads LiteLLM or encodings runs apart: a fork of a process that has them takes five times as long, and
# the others fork a lot.
LOADED = $(addprefix tests/,drop_in integrations/litellm tokens)
APART  = $(addprefix tests/,apps browser cluster faults freethreaded hostile litellm_proxy peers spellings wheels) # have targets of their own
test-py: test-py-forks test-py-loaded

test-py-forks: $(VENV)/.test
	$(PYTEST) -n auto $(patsubst %,--ignore=%,$(APART) $(LOADED))

test-py-loaded: $(VENV)/.test
	$(PYTEST) -n auto $(LOADED)

# What .ci/run runs again on another Python.
python-too: $(VENV)/.test
	$(PYTEST) -n auto $(addprefix tests/,limiters pools routing shared integrations tokens test_api_names.py test_docstrings.py \
	  test_limits.py test_light_import.py)

test-cluster: $(VENV)/.test ## test: limits over many hosts, on real Redis and Valkey servers (apt-get install redis-server valkey-server iproute2)
	$(PYTEST) -n 4 tests/cluster # most of it waits

test-limits: ## test: the storage tests of limits' own repository, against shm:// (fetched from PyPI)
	@$(MAKE) --no-print-directory VENV=$(VENV)-limits limits-upstream

limits-upstream: $(VENV)/.limits-tests
	PYTHONPATH=tests $(VENV)/bin/python -m integrations.limits.upstream -q

test-peers: test-limits ## test: the peers' own tests, against this package (fetched from PyPI); SUITES='flask-limiter slowapi'
	@$(MAKE) --no-print-directory VENV=$(VENV)-peers peers-upstream

peers-upstream: $(VENV)/.peers-tests
	PYTHONPATH=tests $(VENV)/bin/python -m peers.run $(SUITES)

test-dashboard: ## test: the page of fast-shm dashboard in headless Chromium
	@command -v chromedriver >/dev/null || { echo "needs chromium: apt-get install chromium chromium-driver"; exit 1; }
	@$(MAKE) --no-print-directory VENV=$(DASHBOARD) dashboard-page

dashboard-page: $(VENV)/.dashboard-tests
	$(PYTEST) tests/browser/test_page.py

test-docs: docs ## test: the site of the docs, which it builds, in headless Chromium: the search, each page
	@command -v chromedriver >/dev/null || { echo "needs chromium: apt-get install chromium chromium-driver"; exit 1; }
	@$(MAKE) --no-print-directory VENV=$(DASHBOARD) site-pages

site-pages: $(VENV)/.dashboard-tests
	$(PYTEST) tests/browser/test_site.py

test-spellings: ## test: no spelling of a request passes a limit: frameworks and servers (from PyPI); SPELLINGS=20000 SPELLINGS_SEED=2
	@$(MAKE) --no-print-directory VENV=$(SPELLINGS_VENV) spellings

spellings: $(VENV)/.spellings-tests
	$(PYTEST) -n 2 --dist loadgroup tests/spellings

# SECONDS: a short one, as .ci/run has it. KINDS: of gthread, gevent and uvicorn.
MINUTES ?= 10
soak: $(VENV)/.test ## test: one application with every class in it, under gunicorn for MINUTES=10 or SECONDS=20; workers die
	PYTHONPATH=tests $(VENV)/bin/python -m soak.run --seconds $(or $(SECONDS),$$(($(MINUTES) * 60))) $(KINDS:%=--kind %)

test-litellm: $(VENV)/.test $(VENV)/.litellm-proxy ## test: the plugin against LiteLLM's real proxy, 4 workers of either kind; LITELLM=test_proxy,test_hosts
	$(PYTEST) -n 2 --dist loadscope $(if $(LITELLM),$(patsubst %,tests/litellm_proxy/%.py,$(subst $(comma), ,$(LITELLM))),tests/litellm_proxy)
	$(PYTEST) tests/integrations/litellm/test_calls.py # whose 429 and 503 are the proxy's own

test-apps: ## test: real applications of each framework, with real workers; in a venv of their own
	@$(MAKE) --no-print-directory VENV=$(APPS_VENV) apps

apps: $(VENV)/.apps-tests
	$(PYTEST) -n 4 --dist loadfile tests/apps # most of it waits

# Its extension lies beside the usual one, under another name. PYTHON_GIL=0: the GIL stays off, also where a package says
# nothing about it. FREE_THREADED: some of the tests. Left out are those of what has no release for such a Python (gevent, eventlet,
# LiteLLM), of C, of programs that are only started, and those that test-py leaves out.
FREETHREADED ?= $(firstword $(foreach v,3.15t 3.14t 3.13t,$(shell command -v python$(v))))
FREE_THREADED ?= $(addprefix tests/,freethreaded limiters pools routing shared changes durable metrics cli testing \
  integrations tokens test_api_names.py test_docstrings.py test_light_import.py test_limits.py)
WITHOUT_GIL = $(addprefix --ignore=tests/,integrations/litellm) -k 'not gevent and not eventlet'
test-free-threaded: ## test: the tests on a Python without the GIL. FREETHREADED=/path/to/python3.14t, or one is built, once, in 5 minutes
	@python="$(FREETHREADED)"; test -n "$$python" || python=$$(scripts/free_threaded_python) || exit 1; \
	wheels=$$(dirname "$$python")/../wheels; \
	if [ -d "$$wheels" ]; then export PIP_FIND_LINKS="$$wheels"; fi; \
	PYTHON_GIL=0 $(MAKE) --no-print-directory PYTHON="$$python" VENV=$(VENV)-free-threaded \
	  INSTALL='$$(BY_PIP) --only-binary :all:' free-threaded # older releases, where the newest has no wheel for it

test-freethreaded: test-free-threaded # its former name

free-threaded: $(VENV)/.test-free-threaded $(VENV)/tiktoken
	TIKTOKEN_CACHE_DIR=$(abspath $(VENV))/tiktoken/litellm/litellm_core_utils/tokenizers \
	  $(PYTEST) -n auto $(WITHOUT_GIL) $(FREE_THREADED)

# LiteLLM does not run there; its wheel has the files that tiktoken wants.
$(VENV)/tiktoken: $(VENV)/.made
	@$(INSTALL) --no-deps --target $@ litellm

# PYTHONS: of x86-64, by their paths; those that are found, if it is empty.
test-wheels: ## test: make wheels, and each of them on its platform: every CPython that is found, qemu, musl; WHEELS=manylinux-x86_64
	@$(MAKE) --no-print-directory VENV=$(VENV)-wheels wheels-tested

wheels-tested: wheels-built
	PYTHONS="$(PYTHONS)" $(PYTEST) tests/wheels

# What .ci/run always needs, one after the other: the extension is built in place. PYTHON_TOO: another one, which builds
# it again.
DASHBOARD ?= $(VENV)-dashboard
SPELLINGS_VENV ?= $(VENV)-spellings
APPS_VENV ?= $(VENV)-apps
TOGETHER   = test,lint,litellm-proxy$(if $(filter $(VENV),$(DASHBOARD)),$(comma)dashboard-tests)
environments: $(VENV)/.$(TOGETHER)
	@$(MAKE) --no-print-directory VENV=$(APPS_VENV) $(APPS_VENV)/.apps-tests
	$(if $(PYTHON_TOO),@$(MAKE) --no-print-directory PYTHON=$(PYTHON_TOO) VENV=.venv-3.13 INSTALL='$$(BY_PIP)' ANEW=1 .venv-3.13/.test)

test-c: $(C_TESTS:%=run-c-%) ## test: the C tests: each tests/c/*.c is a program; make run-c-NAME runs one

test-aarch64: $(C_TESTS:%=run-aarch64-%) ## test: the C tests as aarch64 under qemu (needs an aarch64 compiler and qemu)

lint: $(VENV)/.lint ## build: ruff, mypy --strict, clang-format, and the compiler's warnings as errors
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FORMATTED)
	@$(MAKE) --no-print-directory lint-c

lint-c:
	$(CC) @csrc/cflags $(C_WARNINGS) -Werror -fsyntax-only csrc/unity.c csrc/tokens/engine.c
	for f in $(C_PROGRAMS); do $(CC) @csrc/cflags $(C_WARNINGS) -Werror -Icsrc -Itests/c -fsyntax-only $$f || exit 1; done

format: $(VENV)/.lint ## build: format Python and C
	$(VENV)/bin/ruff check --fix-only
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(C_FORMATTED)

lib: $(BUILD)/libfast_shm.so ## build: build/libfast_shm.so, for any language; its header is csrc/fast_shm.h

build: $(VENV)/.build ## build: dist/: the sdist, and the wheel for CPython 3.10 and later on this machine
	$(VENV)/bin/python -m build

wheels: ## build: dist/: the sdist, and wheels for glibc and musl on x86-64 and aarch64; WHEELS=manylinux-x86_64: only that one
	@$(MAKE) --no-print-directory VENV=$(VENV)-wheels wheels-built

wheels-built: $(VENV)/.wheels
	$(VENV)/bin/python scripts/wheels.py $(WHEELS)

# -E: a page that is not read again could not warn again.
DOCS_VENV ?= $(VENV)-docs
docs: ## build: the site of the docs, build/docs/index.html, in a venv of its own; a warning is an error
	@$(MAKE) --no-print-directory VENV=$(DOCS_VENV) docs-site

docs-site: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx -E -W -n --keep-going -q -j auto -d $(BUILD)/doctrees docs $(BUILD)/docs
	@echo "the site is $(BUILD)/docs/index.html"

instructions: $(BUILD)/hot ## bench: do the hot paths take more instructions than they did? INSTRUCTIONS=--renew
	@command -v valgrind >/dev/null || { echo "needs valgrind: apt-get install valgrind"; exit 1; }
	@$(PYTHON) -m bench.instructions $< $(firstword $(CC)) $(INSTRUCTIONS)

# hot: the paths that are counted; run alone, it times them. line: what a cache line costs that two cores write.
$(BUILD)/hot $(BUILD)/line: $(BUILD)/%: bench/%.c tests/c/check.h $(C_SOURCES)
	@mkdir -p $(@D)
	$(CC) @csrc/cflags $(HARDENED) $(C_WARNINGS) $(CFLAGS) -Icsrc $< -o $@ -pthread $(LDFLAGS)

scaling: $(BUILD)/line $(VENV)-bench/.peers ## bench: simulate one hot key on 2 to 128 cores; the tables and the plot of docs/scaling.md
	$(VENV)-bench/bin/python -m bench.scaling $<

bench: $(VENV)-bench/.peers ## bench: measure beside the peers, in one run of 15 to 35 minutes; ARGS=--quick: in 2
	env -u PYTHONDONTWRITEBYTECODE $(VENV)-bench/bin/python -m bench $(ARGS) # or each process compiles litellm anew

# Each pass starts the proxies anew. The report has no table of targets that says anything: it asks one question.
bench-proxy: $(VENV)/.litellm-proxy ## bench: what a request costs in LiteLLM's real proxy, with its limiter and the plugin; 10 minutes
	env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -m bench --only proxy_cost $(ARGS)

clean: ## build: remove everything that was made here, .venv included
	rm -rf $(BUILD) dist .venv .venv-* *.egg-info fast_litellm_shm/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The module that lies in the tree is of these sources: setup.py need not build it again. ANEW=1: it does.
NATIVE   = fast_litellm_shm/_native.abi3.so
IF_BUILT = if [ -z "$(ANEW)$$FAST_SHM_CFLAGS$$FAST_SHM_LDFLAGS" ] && [ -e $(NATIVE) ] && \
  [ -z "$$(find csrc setup.py pyproject.toml -type f -newer $(NATIVE))" ]; then export FAST_SHM_BUILT=1; fi

# Virtual environments. $(VENV)/.NAME: the package is installed there, editable, with the extra NAME (or
# several, with commas between them).
# Python sources are read where they are; the rest asks for a new installation when it changes.

$(VENV)/.made $(VENV)-bench/.made:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "there is no $(PYTHON): install Python 3.10 or later, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10: say make PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, os, sysconfig, sys; \
	  sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || \
	  { echo "$(PYTHON) lacks venv or its C headers: apt-get install python3-venv python3-dev"; exit 1; }
	@command -v $(firstword $(CC)) >/dev/null || \
	  { echo "there is no C compiler ($(CC)): install gcc or clang, or say make CC=..."; exit 1; }
	@echo "making $(@D)"
	@$(PYTHON) -m venv $(@D)
	@touch $@

$(VENV)/.%: $(VENV)/.made $(C_SOURCES) csrc/build.py setup.py pyproject.toml
	@echo "installing fast_litellm_shm and what '$*' needs into $(VENV)"
	@$(IF_BUILT); $(INSTALL) --editable '.[$*]'
	@touch $@ $(patsubst %,$(@D)/.%,$(subst $(comma), ,$*))

# The peers have one of their own: fast-litellm changes litellm wherever both are. Those that do not
# install are named, here and in the report, and hold up nothing.
$(VENV)-bench/.peers: $(VENV)-bench/.made $(C_SOURCES) csrc/build.py setup.py pyproject.toml
	@echo "installing fast_litellm_shm and its peers into $(@D)"
	@$(@D)/bin/python -m bench.installing
	@command -v redis-server >/dev/null || \
	  echo "MISSING: redis-server (apt-get install redis-server); the others are measured without it"
	@touch $@

# C

$(BUILD)/libfast_shm.so: $(C_SOURCES)
	@mkdir -p $(@D)
	$(CC) @csrc/cflags $(HARDENED) $(C_WARNINGS) -fPIC -shared -Icsrc -include csrc/exports.h csrc/unity.c -o $@ -pthread $(LDFLAGS)

.PRECIOUS: $(BUILD)/c/% $(BUILD)/aarch64/% # make would take them for intermediate, and delete them

$(BUILD)/c/%: tests/c/%.c $(wildcard tests/c/*.h) $(C_SOURCES)
	@mkdir -p $(@D)
	$(CC) @csrc/cflags $(C_WARNINGS) $(CFLAGS) -Icsrc -Itests/c $< -o $@ -pthread $(LDFLAGS)

run-c-%: $(BUILD)/c/%
	$(RUN) $< $(ARGS)

# Static, so that qemu needs no aarch64 system around it.
$(BUILD)/aarch64/%: tests/c/%.c $(wildcard tests/c/*.h) $(C_SOURCES)
	@command -v $(AARCH64_CC) >/dev/null && command -v $(QEMU) >/dev/null || \
	  { echo "needs $(AARCH64_CC) and $(QEMU): apt-get install gcc-aarch64-linux-gnu qemu-user"; exit 1; }
	@mkdir -p $(@D)
	$(AARCH64_CC) @csrc/cflags $(C_WARNINGS) -Icsrc -Itests/c $< -o $@ -static -pthread

run-aarch64-%: $(BUILD)/aarch64/%
	$(QEMU) $<

# Proofs and tools, which nothing above needs.
include tests/proof.mk tests/sanitize.mk
