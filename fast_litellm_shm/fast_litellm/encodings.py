"""tiktoken's encodings for litellm, over the tables that the host shares.

litellm loads tiktoken's own: 20 to 45 MB and 0.1 to 0.3 s for each encoding, in each worker, and
cl100k_base whatever the model is. :class:`SharedEncoding` stands in its place. It has tiktoken's
only when it is asked for something else than to encode and decode.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal

from fast_litellm_shm._native import Vocabulary
from fast_litellm_shm._shared import features, log
from fast_litellm_shm._shared.dependencies import tiktoken
from fast_litellm_shm.tokens import encoding, vocabulary

_FEATURE = "rust_token_counting"
_EMPTY: AbstractSet[str] = frozenset()

_lock = threading.Lock()  # of the three below; renewed in a forked child: _after_fork()
_tables: dict[str, Vocabulary | None] = {}  # None: the engine cannot count as this encoding does
_compiling: set[str] = set()
_encodings: dict[str, SharedEncoding] = {}


class SharedEncoding(tiktoken.Encoding):
    """The encoding of that name: the same numbers, strings and exceptions as tiktoken's.

    own: makes tiktoken's, for what the tables cannot do. serves: whether to use the tables; called
    for each text."""

    def __init__(
        self,
        name: str,
        tables: Vocabulary,
        own: Callable[[str], tiktoken.Encoding],
        serves: Callable[[], bool],
    ) -> None:
        self.name = name
        self.tables = tables
        self._own, self._serves = own, serves
        self._special_tokens = tables.special_tokens()
        self._special_token_values = set(self._special_tokens.values())

    def __getattr__(self, attribute: str) -> Any:
        """What is not here is tiktoken's: its core, its ranks, and what a later release adds."""
        if attribute.startswith("__") or "_own" not in self.__dict__:
            raise AttributeError(attribute)
        return getattr(self._own(self.name), attribute)

    def encode_ordinary(self, text: str) -> list[int]:
        if type(text) is str and self._serves():
            try:
                return self.tables.encode(text)
            except Exception as error:
                features.record_error(_FEATURE, error)
        return self._own(self.name).encode_ordinary(text)

    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | AbstractSet[str] = _EMPTY,
        disallowed_special: Literal["all"] | Collection[str] = "all",
    ) -> list[int]:
        if self._is_ordinary(text, allowed_special, disallowed_special):
            return self.encode_ordinary(text)
        return self._own(self.name).encode(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        )

    def _is_ordinary(self, text: object, allowed: object, disallowed: object) -> bool:
        """Whether no special token is in the text, or none counts as one. False too for arguments
        that tiktoken refuses: it says so best."""
        if type(text) is not str:
            return False
        if allowed == "all":
            sought = [*self._special_tokens]
        elif isinstance(allowed, (set, frozenset)):
            sought = [*allowed]
        else:
            return False
        if disallowed == "all":
            sought = [*self._special_tokens]
        elif isinstance(disallowed, (tuple, set, frozenset)):
            sought += disallowed
        else:
            return False
        return all(type(token) is str and token not in text for token in sought)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        if type(tokens) in (list, tuple) and self._serves():
            try:
                return self.tables.decode(tokens)
            except (TypeError, ValueError, KeyError, OverflowError):
                pass  # not tokens of this encoding: tiktoken says which
            except Exception as error:
                features.record_error(_FEATURE, error)
        return self._own(self.name).decode_bytes(tokens)

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        return self.decode_bytes(tokens).decode("utf-8", errors=errors)

    def __copy__(self) -> SharedEncoding:
        return self

    def __deepcopy__(self, memo: object) -> SharedEncoding:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return tiktoken.get_encoding, (self.name,)


# tables ------------------------------------------------------------------------------------------


def _compile(name: str) -> None:
    """In a thread: make the file of an encoding."""
    found = None
    try:
        found = vocabulary.load(name)
    except Exception as error:
        log.warning("litellm counts %s without the shared tables: %s", name, error)
    finally:
        with _lock:
            _tables[name] = found
            _compiling.discard(name)


def tables_of(name: str) -> Vocabulary | None:
    """The tables of an encoding. None where the engine cannot count as tiktoken does, and as long
    as there is no file: that takes 1 to 3 s to make, once for a host, in a thread. litellm counts
    with its own meanwhile, so that nobody waits.

    The thread is no daemon: a program that ends first leaves the file to the next one."""
    try:
        return _tables[name]
    except KeyError:
        pass
    with _lock:
        if name in _compiling or name in _tables:
            return _tables.get(name)
        found = vocabulary.find(name)
        if found is not None:
            _tables[name] = found
            return found
        _compiling.add(name)
        try:
            threading.Thread(target=_compile, args=(name,), name=f"compile {name}").start()
        except RuntimeError:  # no thread can be started, or Python is ending
            _compiling.discard(name)
        return None


def _set_cache_folder() -> None:
    """Set TIKTOKEN_CACHE_DIR as litellm's default_encoding.py does, which is not imported now:
    another encoding that the program asks tiktoken for is then found without a download."""
    folder = encoding.litellm_folder()
    chosen = os.environ.get("CUSTOM_TIKTOKEN_CACHE_DIR")
    if chosen:
        os.makedirs(chosen, exist_ok=True)
    elif folder:
        chosen = os.path.join(folder, "litellm_core_utils", "tokenizers")
    if chosen and "litellm.litellm_core_utils.default_encoding" not in sys.modules:
        os.environ["TIKTOKEN_CACHE_DIR"] = chosen


def get(
    name: str, own: Callable[[str], tiktoken.Encoding], serves: Callable[[], bool]
) -> SharedEncoding | None:
    """The encoding of that name over the shared tables; None as long as there are none. One object
    a process, for the first own and serves that came."""
    found = _encodings.get(name)
    if found is None:
        tables = tables_of(name)
        if tables is None:
            return None
        _set_cache_folder()
        found = _encodings.setdefault(name, SharedEncoding(name, tables, own, serves))
    return found


def tables_behind(held: object) -> Vocabulary | None:
    """The tables that count as this object does, if it is one of tiktoken's own encodings, or one
    of ours."""
    if isinstance(held, SharedEncoding):
        return held.tables
    name = getattr(held, "name", None)
    registry = sys.modules.get("tiktoken.registry")
    if isinstance(name, str) and getattr(registry, "ENCODINGS", {}).get(name) is held:
        return tables_of(name)
    return None


def _after_fork() -> None:
    """In a forked child, which has no threads."""
    global _lock
    _lock = threading.Lock()
    _compiling.clear()


os.register_at_fork(after_in_child=_after_fork)
