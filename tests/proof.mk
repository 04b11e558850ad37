# Proofs: what docs/reliability.md tells of, one target each. Part of the Makefile.

.PHONY: crash crash-planted stories stories-planted model linearize linearize-planted fuzz fuzz-tokens fuzz-planted scribble scribble-py faults
.PRECIOUS: $(BUILD)/linear/%

need = @command -v $(1) >/dev/null || { echo "needs $(1): apt-get install $(2)"; exit 1; }

# Killed, stopped, overtaken at every instruction -----------------------------------------------

crash: $(BUILD)/crash/harness ## proofs: kill, stop and overtake at every instruction (Linux, x86-64); CRASH='--every 10'
	$< $(CRASH)

crash-planted: $(VENV)/.test ## proofs: does `crash` find the faults that are planted into copies of csrc/?
	$(PYTEST) -n auto tests/crash/planted.py

# Static: the C library's instructions are part of the path too, and every address is where addr2line has it.
# CRASH_CSRC: another copy of csrc, for the tests that plant faults in it.
CRASH_CSRC ?= csrc
$(BUILD)/crash/harness: $(wildcard tests/crash/*.[ch]) tests/c/check.h $(wildcard $(CRASH_CSRC)/*.[ch] $(CRASH_CSRC)/*/*.[ch]) csrc/cflags
	@mkdir -p $(@D)
	$(CC) @csrc/cflags $(C_WARNINGS) $(CFLAGS) -g -static -I$(CRASH_CSRC) -Itests/c tests/crash/main.c -o $@ -pthread

# The claim protocol, exhaustively ---------------------------------------------------------------

model: ## proofs: check the model of the claim protocol with spin (80 s; MODEL=--long: 7 min)
	@command -v spin >/dev/null && command -v gcc >/dev/null || \
	  { echo "needs spin and gcc: apt-get install spin gcc"; exit 1; }
	@$(PYTHON) tests/model/check.py $(MODEL)

# Histories of real processes ---------------------------------------------------------------------

HISTORIES ?= 2000
linearize: $(BUILD)/linear/linearize $(BUILD)/linear/test_checker ## proofs: are recorded histories of 3-4 processes linearisable? (HISTORIES=2000 of each kind)
	$(BUILD)/linear/test_checker
	$(BUILD)/linear/linearize -n $(HISTORIES) $(if $(SEED),-s $(SEED)) $(if $(KIND),-k $(KIND)) $(if $(HISTORY),-o $(HISTORY))

linearize-planted: ## proofs: does `linearize` find the faults that are planted into copies of csrc/?
	$(PYTHON) tests/linear/planted.py

# Not -O3: what decides is where processes are held up, and the checker is no bottleneck.
$(BUILD)/linear/%: tests/linear/%.c $(wildcard tests/linear/*.h) tests/c/check.h $(C_SOURCES)
	@mkdir -p $(@D)
	$(CC) @csrc/cflags -O2 $(C_WARNINGS) -Icsrc $< -o $@ -pthread $(LDFLAGS)

# Hostile segments ---------------------------------------------------------------------------------

# What is found by `make fuzz` and is no fault stays in build/hostile/found, for the next run.
FUZZ_SECONDS     ?= 30
FUZZ_FLAGS       ?= -timeout=25 -rss_limit_mb=1024 -max_len=1024 -len_control=10 -print_final_stats=1 \
                    -verbosity=0 -artifact_prefix=$(BUILD)/hostile/
SCRIBBLE_SECONDS ?= 10
SCRIBBLE_SEED    ?=
HOSTILE          = $(wildcard tests/hostile/*.[ch]) $(C_SOURCES)
SANITIZED        = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
HAVE_CLANG       = @command -v clang >/dev/null && \
  echo 'int main(void){return 0;}' | clang -fsanitize=address -x c - -o /dev/null 2>/dev/null || \
  { echo "needs clang and its sanitizers: apt-get install clang libclang-rt-14-dev"; exit 1; }

$(BUILD)/hostile/fuzz: $(HOSTILE)
	$(HAVE_CLANG)
	@mkdir -p $(@D)
	clang -std=c11 -D_GNU_SOURCE $(C_WARNINGS) $(SANITIZED) -fsanitize=fuzzer tests/hostile/fuzz.c -o $@

$(BUILD)/hostile/scribble: $(HOSTILE) tests/c/check.h
	@mkdir -p $(@D)
	$(CC) @csrc/cflags $(C_WARNINGS) -Itests/c tests/hostile/scribble.c -o $@ -pthread $(LDFLAGS)

$(BUILD)/hostile/scribble-sanitized: $(HOSTILE) tests/c/check.h
	@mkdir -p $(@D)
	$(CC) @csrc/cflags $(C_WARNINGS) $(SANITIZED) -Itests/c tests/hostile/scribble.c -o $@ -pthread

fuzz: $(BUILD)/hostile/fuzz ## proofs: libFuzzer over segment images, after the kept ones (FUZZ_SECONDS=30)
	@mkdir -p $(BUILD)/hostile/found
	$< -timeout=25 -runs=0 tests/hostile/corpus
	$< $(FUZZ_FLAGS) -max_total_time=$(FUZZ_SECONDS) $(BUILD)/hostile/found tests/hostile/corpus

$(BUILD)/hostile/fuzz_tokens: $(HOSTILE) $(wildcard tests/c/*.h)
	$(HAVE_CLANG)
	@mkdir -p $(@D)
	clang -std=c11 -D_GNU_SOURCE $(C_WARNINGS) $(SANITIZED) -fsanitize=fuzzer tests/hostile/fuzz_tokens.c -o $@ -pthread

fuzz-tokens: $(BUILD)/hostile/fuzz_tokens ## proofs: libFuzzer over the engine that counts tokens, beside a plain reference (FUZZ_SECONDS=30)
	@mkdir -p $(BUILD)/hostile/found-tokens
	$< $(FUZZ_FLAGS) -max_total_time=$(FUZZ_SECONDS) $(BUILD)/hostile/found-tokens

fuzz-planted: ## proofs: does `fuzz` find the faults that are planted into copies of csrc/?
	$(HAVE_CLANG)
	$(PYTHON) tests/hostile/planted.py

scribble: $(BUILD)/hostile/scribble $(BUILD)/hostile/scribble-sanitized ## proofs: random writes over a segment in use (SCRIBBLE_SECONDS=10, twice)
	$(BUILD)/hostile/scribble $(SCRIBBLE_SECONDS) $(SCRIBBLE_SEED)
	$(BUILD)/hostile/scribble-sanitized $(SCRIBBLE_SECONDS) $(SCRIBBLE_SEED)

scribble-py: $(VENV)/.test ## proofs: as `scribble`, with the Python classes and fast-shm
	$(PYTEST) -n auto tests/hostile

# The world's faults -------------------------------------------------------------------------------

FAULTS ?= tests/faults
faults: $(VENV)/.test ## proofs: full and missing /dev/shm, other users, limits, sandboxes, clocks, forks (as root: all of them)
	$(PYTEST) -n auto $(FAULTS)

# Stories of limits that change ---------------------------------------------------------------------

STORIES ?= 10000000
CORES   := $(shell nproc)
stories: $(BUILD)/c/test_stories ## proofs: random sequences of calls and changes of limits, against a reference (STORIES=10000000, SEED)
	@seq 0 $$(($(CORES) - 1)) | xargs -P $(CORES) -I I sh -c \
	  '$< $$(($(STORIES) / $(CORES))) $(or $(SEED),1) $$((I * ($(STORIES) / $(CORES))))'

stories-planted: ## proofs: do `stories` and the C tests find the faults that are planted into copies of csrc/?
	$(PYTHON) tests/changes/planted.py
