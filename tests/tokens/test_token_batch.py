"""Many texts at once: joined, and on all cores, with the same counts."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import texts
from support.children import run_one
from support.waiting import wait_until

from fast_litellm_shm.tokens import batch as token_batch
from fast_litellm_shm.tokens import encoding
from fast_litellm_shm.tokens.batch import BatchCounter

AT_HAND = texts.encodings_at_hand()
pytestmark = pytest.mark.skipif("cl100k_base" not in AT_HAND, reason=texts.WHY_NOT)


def truths(made: list[str], name: str = "cl100k_base") -> dict[str, int]:
    found = encoding.load(name)
    return {text: len(found.encode(text, disallowed_special=())) for text in made}


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    yield
    if token_batch._executor is not None:
        token_batch._executor.shutdown()
    token_batch._forget_threads()


@pytest.mark.parametrize("name", AT_HAND)
def test_joined_texts_count_as_if_alone(name: str) -> None:
    counter = BatchCounter(name)
    made = [*texts.CORPUS.values(), " ", "\n", " \n ", "'s", "s", "<|endoftext|>", "a<|endoftext|>"]
    made += [
        end + text + end for text in ("a", "1", "é", "中") for end in (" ", "\n", "\r\n\t", "'")
    ]
    made += [texts.random_text(seed, 1 + seed * 7 % 300) for seed in range(400)]
    made = list(dict.fromkeys(made))
    assert counter.count(made) == truths(made, name)
    assert counter.count(made[::-1]) == truths(made, name)
    # Without lone surrogates none of them is counted otherwise than joined.
    clean = [text for text in made if not any("\ud800" <= c <= "\udfff" for c in text)]
    joinable = [text for text in clean if counter._first.may_be_joined(text)]
    assert len(joinable) > 300
    assert counter._first._count_joined(joinable) == list(truths(joinable, name).values())
    assert counter.count(clean) == truths(clean, name)


def test_short_texts_are_joined_and_others_are_not() -> None:
    counter = BatchCounter("cl100k_base")
    short = [f"{i} and more " * 20 for i in range(400)]
    odd = ["x<|endoftext|>", "long " * 1000]
    units, chars = counter._units(short + odd)
    assert chars == sum(map(len, short + odd))
    assert [odd[0]] in units
    assert [odd[1]] in units
    assert sorted(sum(units, [])) == sorted(short + odd)
    assert 3 <= len(units) <= 10


def test_helpers_come_when_they_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_batch, "_cores", lambda: 3)
    counter, batch = BatchCounter("cl100k_base"), [f"{k} words " * 2_000 for k in range(9)]
    expected, chars = truths(batch), sum(map(len, batch))
    counter.spend(token_batch._SECONDS_PER_HELPER / 2)
    assert (counter._made, counter._making) == (0, False)
    for helpers in (1, 2):  # one less than cores
        assert not counter.may_help(9, chars) or helpers > 1
        counter.spend(token_batch._SECONDS_PER_HELPER)
        wait_until("it is made", lambda: not counter._making)
        assert (counter._made, len(counter._idle)) == (helpers, helpers)
        assert counter.may_help(9, chars)
        assert not counter.may_help(9, token_batch._LEAST - 1)
        assert not counter.may_help(chars // 49, chars)  # many short ones
        assert counter.count(batch) == expected
        wait_until("another one is made", lambda: not counter._making)
        counter._alone_until = 0.0  # whatever the cores had to do
    counter.spend(3600)
    assert (counter._made, counter._making) == (2, False)
    assert counter.count(["one small text"]) == truths(["one small text"])


def test_nobody_waits_while_a_helper_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_batch, "_cores", lambda: 2)
    counter, go_on, made = BatchCounter("cl100k_base"), threading.Event(), threading.Event()
    plain = token_batch._Encoder.__init__

    def slowly(self: token_batch._Encoder, found: object) -> None:
        go_on.wait(60)
        plain(self, found)
        made.set()

    monkeypatch.setattr(token_batch._Encoder, "__init__", slowly)
    batch = [f"{i} meanwhile " * 2_000 for i in range(9)]
    try:
        counter.spend(3600)
        assert counter.count(batch) == truths(batch)
        assert not made.is_set()
        assert counter._making
    finally:
        go_on.set()
    wait_until("it is made", lambda: len(counter._idle) == 1)


@pytest.mark.parametrize("gain", [0.5, 5.0])
def test_helpers_that_gain_nothing_have_a_rest(
    monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    """As where all cores are taken: then threads take turns."""
    counter, chars = _helping(monkeypatch, 1), token_batch._LEAST
    batch = [f"{i} gain " * 2_000 for i in range(9)]
    expected = truths(batch)
    monkeypatch.setattr(token_batch, "_ALONE_SECONDS", 3600)
    clock, processor = iter([0.0, 1.0]), threading.local()

    def of_this_thread() -> float:  # each of the two works half of the gain
        processor.now = getattr(processor, "now", -gain / 2) + gain / 2
        return float(processor.now)

    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        patch.setattr(time, "thread_time", of_this_thread)
        assert counter.count(batch) == expected
    assert counter.may_help(9, chars) == (gain > 1)
    counter._alone_until = time.monotonic()
    assert counter.may_help(9, chars)


def test_numpy_is_imported_for_helpers_only() -> None:
    """It takes longer than a thousand small batches."""
    code = """
import sys
from fast_litellm_shm.tokens import batch as token_batch
from fast_litellm_shm.tokens.counter import SimpleTokenCounter
token_batch._SECONDS_PER_HELPER = 3600
counter = SimpleTokenCounter()
counter.count_tokens_batch(["a", "b"])
counter.count_tokens_batch([f"{i} words " * 200 for i in range(200)])
print("numpy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_parts() -> None:
    most = token_batch._PART
    made = ["", "a" * most, "b", "c" * (most - 1), "d", "e" * 3 * most, "", "f"]
    found = list(token_batch.parts(made, sum(map(len, made))))
    assert [text for part, _ in found for text in part] == made
    assert [chars for _, chars in found] == [most, most, 1, 3 * most, 1]
    assert [sum(map(len, part)) for part, _ in found] == [chars for _, chars in found]
    assert list(token_batch.parts(made[:1] * 3, 0)) == [(made[:1] * 3, 0)]


def _helping(monkeypatch: pytest.MonkeyPatch, helpers: int) -> BatchCounter:
    monkeypatch.setattr(token_batch, "_cores", lambda: helpers + 1)
    counter = BatchCounter("cl100k_base")
    for _ in range(helpers):
        counter._made += 1
        counter._make()
    assert len(counter._idle) == helpers
    return counter


def test_all_threads_count_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, barrier = _helping(monkeypatch, 2), threading.Barrier(3)
    plain = token_batch._Encoder.count

    def meet(self: token_batch._Encoder, batch: list[str]) -> list[int]:
        barrier.wait(60)  # passes only where three count at once
        return plain(self, batch)

    monkeypatch.setattr(token_batch._Encoder, "count", meet)
    made = [f"meet {i} " * 10_000 for i in range(3)]
    assert counter.count(made) == truths(made)


def test_an_error_in_any_thread_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = _helping(monkeypatch, 2)
    first, plain = counter._first, token_batch._Encoder.count
    made = [f"text {i} " * 10_000 for i in range(6)]
    for of_first in (True, False):

        def fail(self: token_batch._Encoder, batch: list[str], here: bool = of_first) -> list[int]:
            if (self is first) is here:
                raise ArithmeticError("broken")
            return plain(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(token_batch._Encoder, "count", fail)
            with pytest.raises(ArithmeticError, match="broken"):
                for _ in range(50):  # until a helper gets a text, too
                    counter.count(made)
        assert len(counter._idle) == 2
    assert counter.count(made) == truths(made)


def test_where_no_thread_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a function of atexit, when the threads have ended."""
    counter, ended = _helping(monkeypatch, 2), ThreadPoolExecutor(1)
    ended.shutdown()
    monkeypatch.setattr(token_batch, "_executor", ended)
    made = [f"text {i} " * 10_000 for i in range(6)]
    assert counter.count(made) == truths(made)
    assert len(counter._idle) == 2


def test_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = _helping(monkeypatch, 1)
    made = [f"text {i} " * 10_000 for i in range(4)]
    assert counter.count(made) == truths(made)  # the threads run now, here
    found = run_one(counter.count, made, method="fork")
    assert found == truths(made)


def test_what_was_in_hand_at_a_fork_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = _helping(monkeypatch, 1)

    def child() -> tuple[int, int]:
        counter.spend(3600)
        wait_until("it is made", lambda: not counter._making)
        return counter._made, len(counter._idle)

    lent = counter._borrow(1)
    counter._making = True
    assert run_one(child, method="fork") == (1, 1)
    assert (len(lent), counter._made, counter._making) == (1, 1, True)


def test_several_batches_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = _helping(monkeypatch, 2)
    made = [[f"{i} {k} words " * 3_000 for k in range(5)] for i in range(4)]
    found: dict[int, dict[str, int]] = {}

    def work(i: int) -> None:
        found[i] = counter.count(made[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: truths(batch) for i, batch in enumerate(made)}
    assert len(counter._idle) == 2
