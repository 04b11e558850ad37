"""The shared tables and the shared memo behind what litellm counts, encodes and decodes: the same
numbers, types and exceptions, sooner, and without tables of its own in each worker.

This module replaces two functions of litellm. The rest stays as it is, the Router too.

- ``_get_exact_count_function`` of ``litellm.litellm_core_utils.token_counter`` makes the function
  that counts the tokens of one text: for ``token_counter``, and so for ``trim_messages``. If
  litellm itself chose the tokenizer, and the function is one that this module knows, the engine
  counts in its place, with the memo before it. A Hugging Face tokenizer gets the memo alone. All
  other functions are returned as they are. A litellm without that function (1.102.0 and later have
  it) is left alone, and ``get_patch_status()`` says so.
- ``_python_encoding`` of ``litellm.rust_bridge.tokenizer`` (since about 1.108) finds tiktoken's
  encoding of a name: for ``encode``, ``decode``, ``litellm.encoding`` and what providers count. It
  returns one over the shared tables (encodings.py), so that tiktoken's own is not loaded.

The clients of LiteLLM's proxy do not trust each other, and the time of a count would tell a client
what others have sent. So in the proxy's process, the memo keeps a text for the key that sent it
alone: the plugin (:mod:`fast_litellm_shm.integrations.litellm`) names that key. Where it names
none, the text is counted without the memo.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from fast_litellm_shm._native import Vocabulary
from fast_litellm_shm._shared import features, log, settings
from fast_litellm_shm._shared.native import Memo
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.fast_litellm import import_hook
from fast_litellm_shm.tokens import counter as tokens
from fast_litellm_shm.tokens import encoding

_PROXY, _MODULE = "litellm.proxy.proxy_server", import_hook.MODULE
_FUNCTION = "_get_exact_count_function"
_ENCODING_MODULE, _ENCODING_FUNCTION = "litellm.rust_bridge.tokenizer", "_python_encoding"
_FEATURE = "rust_token_counting"
_SINCE = "1.102.0"  # the first litellm with _FUNCTION
_MOST_COUNTERS = 64  # tokenizers of one process; texts of further ones are counted by litellm
_NOT_YET = "litellm is not imported yet"
_LEAST_REMEMBERED = 256  # characters, where the tables count: for fewer, that takes no longer
_AT_ONCE = 64  # chunks; then another thread may run

_lock = threading.RLock()  # renewed in a forked child: _renew_lock()
_reason: str | None = _NOT_YET  # why the replacements are not in place
# Whether ours counts, where one call of litellm's asks twice; None: to be drawn.
_drawn: ContextVar[bool | None] = ContextVar("fast_litellm_shm_drawn", default=None)
_free_ids: dict[int, tuple[Any, int]] = {}  # by id(tokenizer): the tokenizer, its first unused id
_counters: dict[tuple[Any, ...] | None, _Counter] = {}  # by _Known.key


class _Patch:
    """One function of litellm, and ours in its place."""

    def __init__(self, component: str, module: str, function: str) -> None:
        self.component, self.module, self.function = component, module, function
        self.original: Any = None
        self.replacement: Any = None

    def is_applied(self) -> bool:
        module = sys.modules.get(self.module)
        ours = self.replacement
        return ours is not None and getattr(module, self.function, None) is ours

    def apply(self, make: Callable[[Any], Any]) -> bool:
        """Replace the function, if litellm has it."""
        if self.is_applied():
            return True
        module = sys.modules.get(self.module)
        original = getattr(module, self.function, None)
        if not isinstance(original, FunctionType) or original.__module__ != self.module:
            return False
        self.original, self.replacement = original, make(original)
        setattr(module, self.function, self.replacement)
        return True

    def remove(self) -> None:
        if self.is_applied():
            setattr(sys.modules[self.module], self.function, self.original)
        self.original = self.replacement = None


_COUNTING = _Patch("token_counting", _MODULE, _FUNCTION)
_ENCODING = _Patch("encoding", _ENCODING_MODULE, _ENCODING_FUNCTION)
PATCHES = (_COUNTING, _ENCODING)


# which functions are known -----------------------------------------------------------------------


def _free(function: Any) -> dict[str, Any]:
    """The variables of a closure, by name."""
    cells: tuple[CellType, ...] = function.__closure__ or ()
    try:
        contents = [cell.cell_contents for cell in cells]
        return dict(zip(function.__code__.co_freevars, contents, strict=True))
    except ValueError:  # a variable that has no value yet
        return {}


def _code(code: CodeType) -> bytes:
    """A hash of what a function does: litellm's versions may share a segment."""
    parts = [code.co_code, repr(code.co_names).encode()]
    parts += [_code(c) if isinstance(c, CodeType) else repr(c).encode() for c in code.co_consts]
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _is_encoding(found: object) -> bool:
    """Whether it is tiktoken's Encoding, ours, or the one of litellm's Rust part. None changes."""
    kind = type(found)
    where = (kind.__module__, kind.__name__)
    return where in (
        ("tiktoken.core", "Encoding"),
        ("fast_litellm_shm.fast_litellm.encodings", "SharedEncoding"),
        ("litellm.litellm_core_utils.tokenizer", "OpenAIEncoding"),
    )


def _state(tokenizer: Any) -> tuple[Any, ...] | None:
    """Of a Hugging Face tokenizer, what changes its counts and is cheap to read; else None."""
    kind = type(tokenizer)
    if (kind.__module__, kind.__name__) not in (
        ("tokenizers", "Tokenizer"),
        ("litellm.litellm_core_utils.tokenizer", "HuggingFaceTokenizer"),
    ):
        return None
    try:
        known = _free_ids.get(id(tokenizer))
        if known is None:
            free_id = max(tokenizer.get_vocab(True).values(), default=-1) + 1
            known = _free_ids[id(tokenizer)] = tokenizer, free_id
        added = tokenizer.id_to_token(known[1])  # the next token that is added has that id
        special = tokenizer.encode_special_tokens
    except AttributeError:
        return None  # an unknown release of tokenizers
    parts = ("normalizer", "pre_tokenizer", "post_processor", "padding", "truncation")
    return added, special, *(repr(getattr(tokenizer, part, None)) for part in parts)


class _Known(NamedTuple):
    """A function of litellm's that counts the tokens of a text."""

    key: tuple[Any, ...]  # in this process
    name: Callable[[], str]  # in the segment; slow to compute
    keeps: Any  # the objects whose id() is in the key
    held: Any  # the tokenizer
    chunk: int | None  # characters that it counts at a time; None: the whole text


def _quick_key(exact: Any) -> tuple[Any, ...] | None:
    """The key of a function that counts by chunks, without _describe()'s checks: a key that is in
    _counters has passed them. None for another function."""
    code = getattr(exact, "__code__", None)
    if code is None or code.co_freevars != ("chunk_size", "encode_length"):
        return None
    try:
        chunk, encode_length = (cell.cell_contents for cell in exact.__closure__)
        (inner,) = encode_length.__closure__
        return id(inner.cell_contents), chunk, id(code), id(encode_length.__code__)
    except (AttributeError, TypeError, ValueError):
        return None


def _describe(exact: Any) -> _Known | None:
    """What a function does that litellm made; None for an unknown one."""
    if not isinstance(exact, FunctionType) or exact.__module__ != _MODULE:
        return None
    free = _free(exact)
    if set(free) == {"chunk_size", "encode_length"}:
        encode_length, chunk = free["encode_length"], free["chunk_size"]
        inner = _free(encode_length) if isinstance(encode_length, FunctionType) else {}
        held: Any = next(iter(inner.values())) if len(inner) == 1 else None
        if not _is_encoding(held) or not isinstance(chunk, int):
            return None
        codes: tuple[CodeType, ...] = (exact.__code__, encode_length.__code__)
        kind = "OpenAIEncoding" if type(held).__name__ == "OpenAIEncoding" else "Encoding"
        return _Known(
            (id(held), chunk, *map(id, codes)),
            lambda: f"{kind} {held.name} by {chunk} {_fingerprint(codes)}",
            (held, codes),
            held,
            chunk,
        )
    if set(free) == {"tokenizer"}:
        tokenizer = free["tokenizer"]
        state = _state(tokenizer)
        if state is None:
            return None
        code: CodeType = exact.__code__
        return _Known(
            (id(tokenizer), state, code),
            lambda: f"{type(tokenizer).__name__} {_json_hash(tokenizer)} {_fingerprint((code,))}",
            tokenizer,
            tokenizer,
            None,
        )
    return None


def _fingerprint(codes: Sequence[CodeType]) -> str:
    versions = [_version(package) for package in ("litellm", "tiktoken", "tokenizers")]
    parts = b"".join(map(_code, codes)) + " ".join(versions).encode()
    return hashlib.blake2b(parts, digest_size=16).hexdigest()


def _json_hash(tokenizer: Any) -> str:
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()


# the replacements --------------------------------------------------------------------------------


def _encodings() -> ModuleType:
    """The module, which needs tiktoken: litellm has imported that."""
    from fast_litellm_shm.fast_litellm import encodings

    return encodings


# What chunks must be counted alone for: each of these is longer than three of them.
_PROBES = ("it's 1234 cafés \n\n<|endoftext|> 天気 ", "ab ", "\n ", "\ud800é", "🦀")


class _Plain:
    """Counts texts as one of litellm's functions does: with the tables, where there are. Where ours
    fails, litellm's function counts."""

    def __init__(self, exact: Any, known: _Known) -> None:
        self.chunk = known.chunk
        self._exact, self._held = exact, known.held
        self._tables: Vocabulary | None = None
        self._refused = known.chunk is None  # the tables do not count as `exact` does

    def prepare(self) -> None:
        """Take the tables, once they are there. That litellm's function counts each chunk alone, as
        ours does, is tried out."""
        chunk = self.chunk
        if self._tables is not None or self._refused or chunk is None:
            return
        tables = _encodings().tables_behind(self._held)
        if tables is None:
            return
        texts = ["", *(text * (3 * chunk // len(text) + 2) for text in _PROBES)]
        self._refused = any(self._exact(text) != _sum(tables, text, chunk) for text in texts)
        if not self._refused:
            self._tables = tables

    def is_quick(self, text: Any) -> bool:
        """Whether the text takes no longer to count than to look up."""
        return type(text) is str and len(text) < _LEAST_REMEMBERED and self._tables is not None

    def count(self, text: Any) -> int:
        tables, chunk = self._tables, self.chunk
        if tables is not None and chunk is not None and type(text) is str:
            try:
                return tables.count(text) if len(text) <= chunk else _sum(tables, text, chunk)
            except Exception as error:
                _tell(error)
        found: int = self._exact(text)
        return found


class _Counter:
    """The same with the memo before it."""

    def __init__(self, exact: Any, known: _Known) -> None:
        self.plain, self._known = _Plain(exact, known), known
        self._memo: Memo | None = None

    def remember(self) -> None:
        """Make the memo. It refers to `plain` alone: when this counter is dropped, the memo is
        freed, and so reports its sums."""
        if self._memo is None:
            name = f"litellm {self._known.name()}"
            self._memo = tokens.make_memo(Segment.default(), name, self.plain.count, "litellm")

    def count(self, text: Any) -> int:
        return self.count_for(text, None)

    def count_for(self, text: Any, tenant: str | bytes | None) -> int:
        """With what the memo has of all callers, or of this tenant."""
        memo = self._memo
        if memo is None or self.plain.is_quick(text):
            return self.plain.count(text)
        return memo.count(text) if tenant is None else memo.count_for(text, tenant)


def _sum(tables: Vocabulary, text: str, chunk: int) -> int:
    """The tokens of a text whose chunks are counted each alone."""
    count, step, size = 0, chunk * _AT_ONCE, len(text)
    for start in range(0, size, step):
        part = range(start, min(start + step, size), chunk)
        count += sum(tables.count_batch([text[at : at + chunk] for at in part]))
    return count


def _tell(error: Exception) -> None:
    with suppress(Exception):  # for example a warning that the program turns into an error
        features.record_error(_FEATURE, error)


def _counter_of(exact: Any) -> _Counter | None:
    """The counter of a function that is known, made if there is none; else None."""
    known = _describe(exact)
    if known is None:
        return None
    found = _counters.get(known.key)
    if found is None:
        with _lock:
            if len(_counters) >= _MOST_COUNTERS:
                return _counters.get(known.key)
            found = _counters.setdefault(known.key, _Counter(exact, known))
    return found


def _accelerated(exact: Any) -> Any:
    """The function that counts as this one does, or the function itself."""
    counter = _counters.get(_quick_key(exact)) or _counter_of(exact)
    if counter is None:
        return exact
    tenant = tokens.tenant_of_context.get()
    # In the proxy, without a tenant, the client is unknown: the time of a count must tell it
    # nothing of others.
    remembers = tenant is not None or _PROXY not in sys.modules
    if not remembers and counter.plain.chunk is None:
        return exact
    counter.plain.prepare()
    if not remembers:
        return counter.plain.count
    counter.remember()
    return counter.count if tenant is None else lambda text: counter.count_for(text, tenant)


def _draw() -> bool:
    """Whether ours counts now. A share of the calls is drawn (``rollout:N``), once for each."""
    drawn = _drawn.get()
    if drawn is not None:
        return drawn
    try:
        return features.is_enabled(_FEATURE)
    except Exception as error:
        _tell(error)
        return False


def _make_counting(original: Any) -> Any:
    @functools.wraps(original)
    def _get_exact_count_function(
        model: str | None, custom_tokenizer: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if custom_tokenizer or _COUNTING.replacement is not _get_exact_count_function:
            # The caller's own tokenizer may count anything; or this was removed.
            return original(model, custom_tokenizer, *args, **kwargs)
        drawn = _draw()
        token = _drawn.set(drawn)
        try:
            exact = original(model, custom_tokenizer, *args, **kwargs)
        finally:
            _drawn.reset(token)
        try:
            return _accelerated(exact) if drawn else exact
        except Exception as error:
            _tell(error)
            return exact

    return _get_exact_count_function


def _serves() -> bool:
    """Whether the tables are used by an encoding that litellm has got from us."""
    try:
        return _ENCODING.replacement is not None and features.share_of(_FEATURE) > 0
    except Exception as error:
        _tell(error)
        return False


def _make_encoding(original: Any) -> Any:
    get = _encodings().get

    @functools.wraps(original)
    def _python_encoding(name: str) -> Any:
        found = None
        try:
            if _ENCODING.replacement is _python_encoding and _draw():
                found = get(name, original, _serves)
        except Exception as error:
            _tell(error)
        return original(name) if found is None else found

    return _python_encoding


def _patch() -> bool:
    """Replace the functions in litellm's modules that are known. False if the first is not."""
    global _reason
    with _lock:
        if not _COUNTING.apply(_make_counting):
            _reason = _unsupported()
            log.warning("%s", _reason)
            return False
        _ENCODING.apply(_make_encoding)
        _reason = None
        return True


# the API -----------------------------------------------------------------------------------------


def apply_acceleration() -> bool:
    """Put the shared tables and the shared memo behind what litellm counts, encodes and decodes:
    now, or when the program imports litellm. This function does not import litellm, it reads
    litellm's source.

    Returns True if it did, or will. False where litellm is not installed, FAST_LITELLM_ENABLED is
    false, or this litellm has another function (1.102.0 and later have the right one);
    ``get_patch_status()["reason"]`` says which. Calling it again is harmless. Importing
    fast_litellm_shm does the same.
    """
    global _reason
    with _lock:
        if not settings.all_enabled():
            _reason = "FAST_LITELLM_ENABLED is false"
            return False
        if sys.modules.get(_MODULE) is not None:
            return _patch()
        import_hook.install(apply_acceleration)
        missing = _missing()
        _reason = missing or _NOT_YET
        return missing is None


def remove_acceleration() -> None:
    """Put litellm's own functions back. Where another library has replaced ours since, its function
    stays; if that one calls ours, ours passes everything on. So does an encoding that litellm still
    has from us. Calling it again is harmless."""
    global _reason
    with _lock:
        import_hook.remove()
        for patch in PATCHES:
            patch.remove()
        _counters.clear()
        _free_ids.clear()
        _reason = "it was removed by remove_acceleration()"


def get_patch_status() -> dict[str, Any]:
    """``applied``: whether litellm is patched now; ``components``: which parts are
    (``token_counting``; ``encoding``: what encodes and decodes); ``reason``: why it is not, or
    None."""
    applied = _COUNTING.is_applied()
    reason = _reason
    if not applied and reason is None:
        reason = f"another library has replaced {_MODULE}.{_FUNCTION}"
    elif not settings.all_enabled():
        reason = "FAST_LITELLM_ENABLED is false"
    elif reason == _NOT_YET and not import_hook.installed():
        reason = (
            "FAST_LITELLM_ENABLED was false when fast_litellm_shm was imported: call "
            "apply_acceleration()"
        )
    elif not applied and _MODULE not in sys.modules:
        reason = _missing() or reason
    components = [patch.component for patch in PATCHES if applied and patch.is_applied()]
    return {"applied": applied, "components": components, "reason": reason}


def _unsupported() -> str:
    return (
        f"litellm {_version('litellm')} has no function {_MODULE}.{_FUNCTION}, so it is left as it "
        f"is; {_SINCE} and later have it"
    )


def _missing() -> str | None:
    """Why the litellm that the program would import cannot be accelerated; None where it can, or
    where its source cannot be read. Read in the source: an import takes seconds, and a version
    number does not tell what a release has."""
    folder = encoding.litellm_folder()
    if folder is None:
        return "litellm is not installed"
    source = os.path.join(folder, *_MODULE.split(".")[1:]) + ".py"
    try:
        with open(source, encoding="utf-8") as file:
            return None if f"def {_FUNCTION}(" in file.read() else _unsupported()
    except FileNotFoundError:
        return _unsupported()
    except (OSError, ValueError):
        return None


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held it does not live in the child


os.register_at_fork(after_in_child=_renew_lock)
