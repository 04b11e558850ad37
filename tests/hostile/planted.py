"""Do fuzz.c and scribble.c find what they are for? Each fault is planted into a copy of csrc/. The
kept inputs (corpus/) must find those of one process, scribble.c those that need a second one.
Without a fault, fuzz.c finds nothing here, and scribble.c nothing in `make scribble`.

``python tests/hostile/planted.py`` [NAME ...]; needs clang with its sanitizers.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CORPUS = HERE / "corpus"
PATIENCE = 60.0  # seconds, for all kept inputs; they take two; the program ends a hang itself

# name: file, text that is there once, what replaces it; and again, where two checks guard the same
FAULTS: dict[str, list[tuple[str, str, str]]] = {
    "a count of rules is not checked": [
        (
            "limits/limits.h",
            "if (count < 1 || count > FSHM_MAX_LIMITS) return 0;",
            "if (!count) return 0;",
        )
    ],
    "a divisor may be zero": [("limits/algorithms.h", "r->num && r->den &&", "r->num &&")],
    "a slot in the process statistics is not checked": [
        ("stats/key_stats.c", " || slot >= s->slot_count) return;", ") return;")
    ],
    "a limiter in the key statistics is not checked": [
        ("limits/limiter.c", "index >= s->limiter_count || ", "")
    ],
    "a limiter in the key statistics is not checked where keys are counted": [
        ("stats/counters.c", "limiter < s->limiter_count && ", "")
    ],
    "a stored length is not checked": [
        ("stats/key_stats.c", "if (stored > NAME_STORED || stored > size) return 0;", "")
    ],
    "a limiter's name may be longer than its room": [
        (
            "limits/limits.c",
            "if (load_relaxed(&e->name_length) > FSHM_MAX_LIMITER_NAME) return true;",
            "",
        ),
        (
            "limits/limits.c",
            "min_u64(load_relaxed(&e->name_length), FSHM_MAX_LIMITER_NAME);",
            "load_relaxed(&e->name_length);",
        ),
    ],
    "permits without end": [
        ("limits/limits.h", "i + 1 != has || r->n > MAX_PERMITS", "i + 1 != has"),
        (
            "limits/limits.h",
            "rule_sane(&p->rules[0]) && p->rules[0].n <= MAX_PERMITS",
            "rule_sane(&p->rules[0])",
        ),
    ],
    "the header is believed": [
        ("core/image.c", "offsetof(header_t, names_mode)", "offsetof(header_t, names_words)")
    ],
    "the mapping is believed": [
        ("core/segment.c", "out->capacity = s->capacity;", "out->capacity = s->header->capacity;")
    ],
    "a claim is waited for": [
        (
            "core/hash_table.c",
            "bool pending = IS_PENDING(pair.when);",
            "while (IS_PENDING(pair.when)) pair = pair_load(&s->slots[slot + k]);\n"
            "      bool pending = IS_PENDING(pair.when);",
        )
    ],
    "a damaged limiter is shown": [
        (
            "limits/limits.c",
            "if (!load_genuine(s, index, &p)) return damage",
            "if (!limits_load(s, index, &p)) return damage",
        ),
    ],
    "a metric's name may be longer than its room": [
        ("stats/histogram.c", "length > METRIC_NAME || component >= length", "component >= length")
    ],
    "a deployment's place is not checked": [
        ("stats/deployments.c", "if (deployments[i] < DEPLOYMENTS) {", "if (count) {")
    ],
    "a cut file is looked into": [
        ("core/damage.c", "if (kind == FSHM_DAMAGE_SIZE) return kind;", "")
    ],
}


# Read twice, or waited for: only seen while somebody writes. Likely in a second or two, at chance.
RACES: dict[str, list[tuple[str, str, str]]] = {
    "a count is read twice": [
        (
            "limits/limits.h",
            "i < count; i++) read_rule(e, SET_RULE(set, i), &out[i]);",
            "i < SET_COUNT(load_relaxed(&e->set)); i++)\n"
            "    read_rule(e, SET_RULE(load_relaxed(&e->set), i), &out[i]);",
        )
    ],
    "a length is read twice": [
        (
            "stats/key_stats.c",
            "if (stored > NAME_STORED || stored > size) return 0;",
            "if (stored > NAME_STORED || stored > size) return 0;\n"
            "  stored = load_relaxed(&s->names[at % s->names_words]) & 0xffff;",
        )
    ],
    "a claim is waited for": FAULTS["a claim is waited for"],
}


def build(folder: pathlib.Path, faults: list[tuple[str, str, str]], source: str) -> pathlib.Path:
    """The program over a copy of csrc/ with these faults."""
    shutil.copytree(CSRC, folder / "csrc")
    for tests in (HERE, HERE.parent / "c"):
        target = folder / "tests" / tests.name
        target.mkdir(parents=True)
        for path in tests.glob("*.[ch]"):
            shutil.copy(path, target)
    for file, old, new in faults:
        path = folder / "csrc" / file
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"{file} has {text.count(old)} times, not once: {old}")
        path.write_text(text.replace(old, new), encoding="utf-8")
    command = (
        "clang -std=c11 -D_GNU_SOURCE -O0 -w -fsanitize=address,undefined "
        f"-fno-sanitize-recover=all -DREPLAY -DDEADLINE=5 -Itests/c tests/hostile/{source} "
        "-o program -pthread"
    )
    subprocess.run(command.split(), cwd=folder, check=True)
    return folder / "program"


def run(program: pathlib.Path, *arguments: str) -> tuple[bool, str]:
    """Does it find a fault? And what it said of it."""
    with subprocess.Popen(
        [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        try:
            said = child.communicate(timeout=PATIENCE)[0].splitlines()
        except subprocess.TimeoutExpired:
            child.kill()
            said = [*child.communicate()[0].splitlines(), "hung"]
    if child.returncode == -signal.SIGALRM:
        said.append("hung")
    for left in pathlib.Path("/dev/shm").glob(f"fast_litellm_shm.*.t-*-{child.pid}*"):
        left.unlink()
    told = [line for line in said if re.search("ERROR: Add|runtime error|not so|hung|hangs", line)]
    inputs = [os.path.basename(line) for line in said if line.startswith(str(CORPUS))]
    return child.returncode != 0, ": ".join([*inputs[-1:], told[0][-110:] if told else "?"])


def main(wanted: list[str]) -> int:
    """Plant them one by one."""
    passed = failed = 0
    kept = sorted(str(path) for path in CORPUS.iterdir())
    for source, arguments, table in (
        ("fuzz.c", kept, {"no fault": [], **FAULTS}),
        ("scribble.c", ["20", "1"], RACES),
    ):
        for name, faults in table.items():
            if wanted and name not in wanted:
                continue
            with tempfile.TemporaryDirectory() as folder:
                program = build(pathlib.Path(folder), faults, source)
                for _ in range(3 if faults else 1):
                    found, said = run(program, *arguments)
                    if found:
                        break
            good = found == bool(faults)
            passed, failed = passed + good, failed + (not good)
            print(
                "ok" if good else "FAILED", f"{name}:", f"found: {said}" if found else "not found"
            )
            sys.stdout.flush()
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
