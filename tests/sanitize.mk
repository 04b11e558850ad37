# Sanitizers and analysers. None is needed to build or to test. Each C variant is `make test-c` again, with
# a build folder, a compiler and flags of its own; each tool must first report faults that are committed
# on purpose. Part of the Makefile.

.PHONY: sanitize sanitize-c sanitize-py tsan tsan-free-threaded memcheck analyse analyse-warnings compilers

sanitize: sanitize-c sanitize-py ## proofs: address and undefined-behaviour sanitizer: C tests, and the extension in Python

tsan: ## proofs: thread sanitizer: all calls of fast_shm.h by threads on one mapping, and one vocabulary. ROUNDS=100000 for longer, SEED=n

memcheck: ## proofs: valgrind over the C tests

analyse: ## proofs: clang-tidy, every warning of gcc and clang as an error, gcc -fanalyzer (4 minutes, 10 GB)

compilers: ## proofs: the C tests as gcc and clang make them: -O0, -O2, -O2 -flto. VARIANTS=... for others

# Commits faults that a tool must report: `$(EXPECT) PROGRAM FAULT...` (tests/c/faults/expect.sh).
$(BUILD)/faults: tests/c/faults/faults.c tests/c/check.h $(C_SOURCES)
	@mkdir -p $(@D)
	$(CC) @csrc/cflags -w $(CFLAGS) -Icsrc $< -o $@ -pthread $(LDFLAGS) # -w: it is wrong on purpose

EXPECT = RUN="$(RUN)" tests/c/faults/expect.sh $(BUILD)/faults

DEBUG = -O1 -g -fno-omit-frame-pointer
DEBUG_PLAIN = $(subst -O1,-O0,$(DEBUG)) # where twenty programs would be optimised longer than they run
ASAN  = -fno-sanitize-recover=all -fsanitize=address,undefined,float-divide-by-zero
# Beyond "undefined": conversions that lose a value or its sign, which are no undefined behaviour.
ASAN_CLANG = $(ASAN),implicit-conversion,nullability
ASAN_GCC   = $(ASAN),float-cast-overflow
SANITIZER_OPTIONS = UBSAN_OPTIONS=exitcode=99:print_stacktrace=1 TSAN_OPTIONS=exitcode=99 \
  ASAN_OPTIONS=exitcode=99:detect_stack_use_after_return=1:strict_string_checks=1

sanitize-c:
	$(call need,$(CLANG),clang libclang-rt-dev)
	@$(SANITIZER_OPTIONS) $(MAKE) --no-print-directory check-asan test-c BUILD=$(BUILD)/asan \
	  CC=$(CLANG) CFLAGS="$(DEBUG_PLAIN) $(ASAN_CLANG)"

check-asan: $(BUILD)/faults
	$(EXPECT) overflow use-after-free leak shift division none-but-ordered-by-a-swap

ROUNDS ?= 20000
tsan:
	$(call need,$(CLANG),clang libclang-rt-dev)
	@$(SANITIZER_OPTIONS) $(MAKE) --no-print-directory check-tsan run-c-test_threads run-c-test_tokens BUILD=$(BUILD)/tsan \
	  CC=$(CLANG) CFLAGS="$(DEBUG) -fsanitize=thread -mcx16" ARGS="$(ROUNDS) 6 $(or $(SEED),1)"

check-tsan: $(BUILD)/faults
	$(EXPECT) race race-with-a-swap none-but-ordered-by-a-swap

# The extension and Python itself as clang's sanitizer makes them, in a copy of the tree. pip of another Python fetches what
# the tests need: under the sanitizer it takes a quarter of an hour. Without the test of forks: the sanitizer swaps 16 bytes
# under a lock of each process, so a child and its parent may both win (seen: 20,001 of 20,000). Without hypothesis' plugin:
# its native part is not made with the sanitizer.
TSAN_TREE = $(BUILD)/tsan-py
TSAN_PIP  = $(BY_PIP) --target site --only-binary :all: --implementation cp --python-version 3.13 --abi cp313t \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform linux_x86_64
tsan-free-threaded: $(VENV)/.test ## proofs: thread sanitizer over threads of one process, on a Python without the GIL, which is built once, in 15 minutes
	$(call need,$(CLANG),clang libclang-rt-dev)
	@rm -rf $(TSAN_TREE) && mkdir -p $(TSAN_TREE) && cp -R $(PY_FILES) $(TSAN_TREE) && rm -f $(TSAN_TREE)/fast_litellm_shm/*.so
	@python=$$(scripts/free_threaded_python thread-sanitizer) && wheels=$$(dirname "$$python")/../wheels && cd $(TSAN_TREE) && \
	  PIP_FIND_LINKS="$$wheels" $(subst $(VENV)/,$(abspath $(VENV))/,$(TSAN_PIP)) \
	    cffi numpy psutil tiktoken setuptools pytest hypothesis pytest-rerunfailures redis && \
	  export PYTHON_GIL=0 PYTHONPATH=site:.:tests && \
	  CC=$(CLANG) FAST_SHM_CFLAGS="$(DEBUG) -fsanitize=thread -mcx16" FAST_SHM_LDFLAGS=-fsanitize=thread TSAN_OPTIONS=report_bugs=0 \
	    "$$python" setup.py -q build_ext --inplace && \
	  TSAN_OPTIONS=exitcode=99:suppressions=tests/support/tsan.supp "$$python" -m pytest -q -p no:cacheprovider \
	    -p no:hypothesispytest tests/freethreaded --deselect tests/freethreaded/test_threads.py::test_forks_while_others_call

VALGRIND = valgrind --quiet --vgdb=no --error-exitcode=99 --trace-children=yes --leak-check=full \
  --show-leak-kinds=definite,indirect,possible --errors-for-leak-kinds=definite,indirect,possible
# Not a thousand processes of the same code.
MEMCHECK_C = $(filter-out test_many_processes,$(C_TESTS))
memcheck:
	$(call need,valgrind,valgrind)
	@CHECK_FEWER=1 $(MAKE) --no-print-directory check-memcheck $(MEMCHECK_C:%=run-c-%) BUILD=$(BUILD)/memcheck \
	  CFLAGS="$(DEBUG)" RUN="$(VALGRIND)"

check-memcheck: $(BUILD)/faults
	$(EXPECT) overflow use-after-free leak uninitialised none-but-ordered-by-a-swap

# COMPILER@FLAGS, + for a blank
VARIANTS ?= gcc@-O0 gcc@-O2 gcc@-O2+-flto $(CLANG)@-O0 $(CLANG)@-O2 $(CLANG)@-O2+-flto
compilers: $(VARIANTS:%=variant-%)

variant-%:
	$(call need,$(firstword $(subst @, ,$*)),gcc clang llvm)
	@$(MAKE) --no-print-directory test-c BUILD=$(BUILD)/variants/$(subst +,,$(subst @,,$*)) \
	  CC=$(firstword $(subst @, ,$*)) CFLAGS="$(subst +, ,$(word 2,$(subst @, ,$*)))"

# The extension as gcc's sanitizers make it, in a copy of the tree, so that the usual build stays as it is.
# Two runs: tests, without a look at leaks; then each class again and again with one, for which the
# allocator's stacks must be whole (slow), so that lsan.supp can tell whose a leak is.
PY_TREE  = $(BUILD)/asan-py
PY_FILES = csrc fast_litellm_shm tests bench examples setup.py pyproject.toml README.md LICENSE MANIFEST.in
PY_TESTS ?= tests/shared/test_garbage.py tests/limiters/test_rate.py tests/test_limits.py tests/limiters/test_batch.py tests/drop_in/test_simple.py \
  tests/shared/test_segment.py tests/shared/test_errors.py tests/limiters/test_quota.py tests/limiters/test_concurrency.py tests/pools/test_pool.py \
  tests/routing/test_routing.py tests/routing/test_deployments.py tests/shared/test_performance.py tests/integrations/limits/test_storage.py
PY_RUN = LD_PRELOAD=$$(gcc -print-file-name=libasan.so):$$(gcc -print-file-name=libstdc++.so) \
  PYTHONMALLOC=malloc PYTHONPATH=.:tests

sanitize-py: $(VENV)/.test
	$(call need,gcc,gcc libc6-dev)
	@$(VENV)/bin/python -c 'import setuptools' || { echo "needs setuptools in $(VENV): pip install setuptools"; exit 1; }
	@rm -rf $(PY_TREE) && mkdir -p $(PY_TREE) && cp -R $(PY_FILES) $(PY_TREE) && rm -f $(PY_TREE)/fast_litellm_shm/*.so
	cd $(PY_TREE) && CC=gcc FAST_SHM_CFLAGS="$(DEBUG) $(ASAN_GCC)" FAST_SHM_LDFLAGS="$(ASAN_GCC)" \
	  $(abspath $(VENV))/bin/python setup.py -q build_ext --inplace
	cd $(PY_TREE) && $(SANITIZER_OPTIONS):detect_leaks=0 $(PY_RUN) \
	  $(abspath $(VENV))/bin/python -m pytest -q -p no:cacheprovider $(PYTEST_ARGS) $(PY_TESTS)
	cd $(PY_TREE) && UBSAN_OPTIONS=exitcode=99 LSAN_OPTIONS=suppressions=tests/support/lsan.supp:print_suppressions=0 \
	  ASAN_OPTIONS=exitcode=99:fast_unwind_on_malloc=0:malloc_context_size=20 \
	  RUN="env $(PY_RUN) $(abspath $(VENV))/bin/python" \
	  sh tests/c/faults/expect.sh tests/support/leaks.py none-but-calls c object

# The extension's C as one file, as cffi compiles it but for its own code. Python's headers are not ours.
analyse: analyse-warnings analyse-gcc
analyse-warnings: warnings-gcc warnings-clang analyse-tidy # what .ci/run has

PYTHON_H = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
without_comments = $(shell sed 's/\#.*//' $(1))
ANALYSED = $(BUILD)/analyse/extension.c
TESTS_C  = $(wildcard tests/c/*.c tests/c/faults/*.c)
# In tests: exact values are compared, CHECK_EQ takes any type, random_state >> a, b is an idiom, and nothing is hot.
GCC_IN_TESTS   = -Wno-bad-function-cast -Wno-float-equal
CLANG_IN_TESTS = -Wno-bad-function-cast -Wno-float-equal -Wno-comma -Wno-atomic-implicit-seq-cst

$(ANALYSED): tests/sanitize.mk
	@mkdir -p $(@D)
	@printf '%s\n' '#define Py_LIMITED_API 0x030A0000' '#include <Python.h>' '#include "unity.c"' \
	  '#include "tokens/engine.c"' \
	  '#include "python/py_module.c"' 'PyMODINIT_FUNC PyInit__native(void) { return NULL; }' >$@

# -Wno-analyzer-malloc-leak: it loses track of what is freed by its last user (plan_drop); make sanitize-py
# looks for leaks.
analyse-gcc: $(ANALYSED)
	$(call need,gcc,gcc libc6-dev)
	gcc @csrc/cflags -O1 -fanalyzer -Wno-analyzer-malloc-leak -Werror -Icsrc -isystem $(PYTHON_H) -c -o /dev/null $<

# -Wno-pedantic: a PyType_Slot holds functions as void *, as POSIX allows and ISO C does not.
warnings-gcc: $(ANALYSED)
	$(call need,gcc,gcc libc6-dev)
	gcc @csrc/cflags $(C_WARNINGS) -Werror $(call without_comments,csrc/warnings.gcc) -Icsrc -c -o /dev/null csrc/unity.c
	gcc @csrc/cflags $(C_WARNINGS) -Werror $(call without_comments,csrc/warnings.gcc) -Icsrc -c -o /dev/null csrc/tokens/engine.c
	gcc @csrc/cflags $(C_WARNINGS) -Werror $(call without_comments,csrc/warnings.gcc) -Wno-pedantic -Icsrc \
	  -isystem $(PYTHON_H) -c -o /dev/null $<
	for f in $(TESTS_C); do gcc @csrc/cflags $(C_WARNINGS) -Werror $(call without_comments,csrc/warnings.gcc) \
	  $(GCC_IN_TESTS) -Icsrc -Itests/c -fsyntax-only $$f || exit 1; done

warnings-clang: $(ANALYSED)
	$(call need,$(CLANG),clang)
	$(CLANG) @csrc/cflags -Werror $(call without_comments,csrc/warnings.clang) -Icsrc -isystem $(PYTHON_H) \
	  -fsyntax-only $< # its warnings need no code, as gcc's do
	for f in $(TESTS_C); do $(CLANG) @csrc/cflags -Werror $(call without_comments,csrc/warnings.clang) \
	  $(CLANG_IN_TESTS) -Icsrc -Itests/c -fsyntax-only $$f || exit 1; done

analyse-tidy: $(ANALYSED)
	$(call need,clang-tidy,clang-tidy)
	clang-tidy --quiet --config-file=.clang-tidy $< -- $$(cat csrc/cflags) -Icsrc -isystem $(PYTHON_H) \
	  2>$(<D)/tidy.log || { cat $(<D)/tidy.log; exit 1; } # there: how many warnings Python's headers would give
