"""The shared memo behind ``litellm.token_counter``: the same numbers, types and exceptions, sooner.

This module replaces one function of litellm: ``_get_exact_count_function`` of
``litellm.litellm_core_utils.token_counter``, which makes the function that counts the tokens of one
text. The replacement puts the memo before a function that it knows, if litellm itself chose the
tokenizer; it returns all others as they are. The rest of litellm stays as it is, the Router too. A
litellm without that function (1.102.0 and later have it) is left alone, and ``get_patch_status()``
says so.

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
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from fast_litellm_shm._shared import features, log, settings
from fast_litellm_shm._shared.native import Memo
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.fast_litellm import import_hook
from fast_litellm_shm.tokens import counter as tokens
from fast_litellm_shm.tokens import encoding

_PROXY, _MODULE = "litellm.proxy.proxy_server", import_hook.MODULE
_FUNCTION = "_get_exact_count_function"
_FEATURE, _COMPONENT = "rust_token_counting", "token_counting"
_SINCE = "1.102.0"  # the first litellm with that function
_MOST_MEMOS = 64  # tokenizers of one process; texts of further ones are counted without a memo
_NOT_YET = "litellm is not imported yet"

_lock = threading.RLock()  # renewed in a forked child: _renew_lock()
_original: Any = None  # litellm's function
_replacement: Any = None  # ours
_reason: str | None = _NOT_YET  # why the replacement is not in place
_free_ids: dict[int, tuple[Any, int]] = {}  # by id(tokenizer): the tokenizer, its first unused id
# By _describe()'s key: the memo, and the object whose id() is in that key (kept, so that the id
# stays its own).
_memos: dict[tuple[Any, ...], tuple[Memo, Any]] = {}


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
    """Whether it is tiktoken's Encoding, or the one of litellm's Rust part. Both never change."""
    kind = type(found)
    where = (kind.__module__, kind.__name__)
    return where in (
        ("tiktoken.core", "Encoding"),
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


def _describe(exact: Any) -> tuple[tuple[Any, ...], Callable[[], str], Any] | None:
    """Of a function that litellm made: its key in this process, its name in the segment (slow to
    compute), and the object whose id() is in the key. None for an unknown function."""
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
        return (
            (id(held), chunk, *codes),
            lambda: f"{type(held).__name__} {held.name} by {chunk} {_fingerprint(codes)}",
            held,
        )
    if set(free) == {"tokenizer"}:
        tokenizer = free["tokenizer"]
        state = _state(tokenizer)
        if state is None:
            return None
        code: CodeType = exact.__code__
        return (
            (id(tokenizer), state, code),
            lambda: f"{type(tokenizer).__name__} {_json_hash(tokenizer)} {_fingerprint((code,))}",
            tokenizer,
        )
    return None


def _fingerprint(codes: Sequence[CodeType]) -> str:
    versions = [_version(package) for package in ("litellm", "tiktoken", "tokenizers")]
    parts = b"".join(map(_code, codes)) + " ".join(versions).encode()
    return hashlib.blake2b(parts, digest_size=16).hexdigest()


def _json_hash(tokenizer: Any) -> str:
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()


# the replacement ---------------------------------------------------------------------------------


def _memoized(exact: Any) -> Any:
    """The function behind the memo, or the function itself."""
    described = _describe(exact)
    if described is None:
        return exact
    tenant = tokens.tenant_of_context.get()
    if tenant is None and _PROXY in sys.modules:
        return exact  # the client is unknown: the time of a count must tell it nothing of others
    key, name, held = described
    found = _memos.get(key)
    if found is None:
        with _lock:
            if key not in _memos:
                if len(_memos) >= _MOST_MEMOS:
                    return exact
                memo = tokens.make_memo(Segment.default(), f"litellm {name()}", exact, "litellm")
                _memos[key] = memo, held
            found = _memos[key]
    memo = found[0]
    return memo if tenant is None else lambda text: memo.count_for(text, tenant)


def _make_replacement(original: Any) -> Any:
    @functools.wraps(original)
    def _get_exact_count_function(
        model: str | None, custom_tokenizer: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        exact = original(model, custom_tokenizer, *args, **kwargs)
        if custom_tokenizer or _replacement is not _get_exact_count_function:
            return exact  # the caller's own tokenizer may count anything; or this was removed
        try:
            return _memoized(exact) if features.is_enabled(_FEATURE) else exact
        except Exception as error:
            with suppress(Exception):  # for example a warning that the program turns into an error
                features.record_error(_FEATURE, error)
            return exact

    return _get_exact_count_function


def _patch(module: ModuleType) -> bool:
    """Replace the function in litellm's module, if that function is known."""
    global _original, _replacement, _reason
    with _lock:
        if _replacement is not None and getattr(module, _FUNCTION, None) is _replacement:
            return True
        original = getattr(module, _FUNCTION, None)
        if not isinstance(original, FunctionType) or original.__module__ != _MODULE:
            _reason = _unsupported()
            log.warning("%s", _reason)
            return False
        _original, _replacement = original, _make_replacement(original)
        setattr(module, _FUNCTION, _replacement)
        _reason = None
        return True


# the API -----------------------------------------------------------------------------------------


def apply_acceleration() -> bool:
    """Put the shared memo behind ``litellm.token_counter``: now, or when the program imports
    litellm. This function does not import litellm, it reads litellm's source.

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
        module = sys.modules.get(_MODULE)
        if module is not None:
            return _patch(module)
        import_hook.install(apply_acceleration)
        missing = _missing()
        _reason = missing or _NOT_YET
        return missing is None


def remove_acceleration() -> None:
    """Put litellm's own function back. Where another library has replaced ours since, its function
    stays; if that one calls ours, ours passes everything on. Calling it again is harmless."""
    global _original, _replacement, _reason
    with _lock:
        import_hook.remove()
        module = sys.modules.get(_MODULE)
        if _replacement is not None and getattr(module, _FUNCTION, None) is _replacement:
            setattr(module, _FUNCTION, _original)
        _original = _replacement = None
        _memos.clear()
        _free_ids.clear()
        _reason = "it was removed by remove_acceleration()"


def get_patch_status() -> dict[str, Any]:
    """``applied``: whether litellm is patched now; ``components``: which parts are
    (``token_counting``); ``reason``: why it is not, or None."""
    module = sys.modules.get(_MODULE)
    applied = _replacement is not None and getattr(module, _FUNCTION, None) is _replacement
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
    return {"applied": applied, "components": [_COMPONENT] if applied else [], "reason": reason}


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
