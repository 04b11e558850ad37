"""Many texts at once: joined, and on all cores, with the same counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import texts
from support.children import run_one

from fast_litellm_shm import encoding, token_batch
from fast_litellm_shm.token_batch import BatchCounter

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
    monkeypatch.setattr(token_batch, "_CHARS_PER_HELPER", 400_000)
    counter, made = BatchCounter("cl100k_base"), 0
    for i in range(6):
        batch = [f"{i} {k} words " * 2_000 for k in range(9)]
        assert counter.count(batch) == truths(batch)
        assert counter._made == len(counter._helpers)  # all are given back
        assert made <= counter._made <= made + 1
        made = counter._made
    assert made == 2  # one less than cores
    assert counter.count(["one small text"]) == truths(["one small text"])


def _helping(monkeypatch: pytest.MonkeyPatch, helpers: int) -> BatchCounter:
    monkeypatch.setattr(token_batch, "_cores", lambda: helpers + 1)
    counter = BatchCounter("cl100k_base")
    for _ in range(helpers):
        helper = counter._make()
        assert helper is not None
        counter._helpers.append(helper)
        counter._made += 1
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
        assert len(counter._helpers) == 2
    assert counter.count(made) == truths(made)


def test_where_no_thread_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a function of atexit, when the threads have ended."""
    counter, ended = _helping(monkeypatch, 2), ThreadPoolExecutor(1)
    ended.shutdown()
    monkeypatch.setattr(token_batch, "_executor", ended)
    made = [f"text {i} " * 10_000 for i in range(6)]
    assert counter.count(made) == truths(made)
    assert len(counter._helpers) == 2


def test_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = _helping(monkeypatch, 1)
    made = [f"text {i} " * 10_000 for i in range(4)]
    assert counter.count(made) == truths(made)  # the threads run now, here
    found = run_one(counter.count, made, method="fork")
    assert found == truths(made)


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
    assert len(counter._helpers) == 2
