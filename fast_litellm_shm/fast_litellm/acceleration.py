"""The shared memo under ``litellm.token_counter``: the same numbers, types and exceptions, sooner.

Patched is one function of litellm's, ``_get_exact_count_function`` of
``litellm.litellm_core_utils.token_counter``, which makes the function that counts the tokens of one
text. What it makes is put behind the memo where it is one of those known here, with a tokenizer
that litellm itself chose; else it is passed on as it is. All else of litellm, its Router too, stays
untouched. A litellm without that function (1.102.0 and later have it) is left alone, and
``get_patch_status()`` says so.

The clients of LiteLLM's proxy are strangers to each other, and how long a count takes would tell
one what others have sent. So in the proxy's process a text is remembered for the key that sent it
alone, as the plugin (:mod:`fast_litellm_shm.integrations.litellm`) says; where nobody says whose it
is, it is counted anew.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from fast_litellm_shm._shared import features, settings
from fast_litellm_shm._shared.native import Memo
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.tokens import counter as tokens

_PROXY = "litellm.proxy.proxy_server"
_MODULE = "litellm.litellm_core_utils.token_counter"
_FUNCTION = "_get_exact_count_function"
_FEATURE, _COMPONENT = "rust_token_counting", "token_counting"
_SINCE = "1.102.0"  # the first litellm with that function
_MOST_MEMOS = 64  # tokenizers of one process; more are counted without

CountFunction = Callable[[str], int]

_lock = threading.RLock()  # renewed in a forked child: _renew_lock()
_original: Any = None  # what we replaced, and by what
_replacement: Any = None
_reason: str | None = "litellm is not imported yet"  # why it is not applied
_free_ids: dict[int, tuple[Any, int]] = {}  # by tokenizer: itself, and its first unused token id
_memos: dict[tuple[Any, ...], tuple[Memo, Any]] = {}  # and what keeps its ids in use


# which functions are known -----------------------------------------------------------------------


def _free(function: Any) -> dict[str, Any]:
    """What a closure has closed over, by name."""
    cells: tuple[CellType, ...] = function.__closure__ or ()
    try:
        contents = [cell.cell_contents for cell in cells]
        return dict(zip(function.__code__.co_freevars, contents, strict=True))
    except ValueError:  # a cell that is empty still
        return {}


def _code(code: CodeType) -> bytes:
    """What a function does, for telling litellm's versions apart in a segment they share."""
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
    """tiktoken's, or the one of the same name in litellm's Rust part: both cannot be changed."""
    kind = type(found)
    where = (kind.__module__, kind.__name__)
    return where in (
        ("tiktoken.core", "Encoding"),
        ("litellm.litellm_core_utils.tokenizer", "OpenAIEncoding"),
    )


def _state(tokenizer: Any) -> tuple[Any, ...] | None:
    """Of a Hugging Face tokenizer: what is cheap to see and changes its counts; None for others."""
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
        return None  # a release of theirs that is not known here
    parts = ("normalizer", "pre_tokenizer", "post_processor", "padding", "truncation")
    return added, special, *(repr(getattr(tokenizer, part, None)) for part in parts)


def _describe(exact: Any) -> tuple[tuple[Any, ...], Callable[[], str], Any] | None:
    """Of a function that litellm made: its key in this process, its name in the segment (slow to
    find), and what keeps the key's ids in use. None where it is none of those known."""
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


# putting the memo in front -----------------------------------------------------------------------


def _memoized(exact: Any) -> Any:
    """The function with the memo in front, or the function itself."""
    described = _describe(exact)
    if described is None:
        return exact
    tenant = tokens.tenant_of_context.get()
    if tenant is None and _PROXY in sys.modules:
        return exact  # of whom, nobody says: how long it takes must tell nothing of other clients
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
            return exact  # a tokenizer of the caller's may count anything; or we were removed
        try:
            return _memoized(exact) if features.is_enabled(_FEATURE) else exact
        except Exception as error:
            with suppress(Exception):  # a warning that was made an error, say
                features.record_error(_FEATURE, error)
            return exact

    return _get_exact_count_function


def _patch(module: ModuleType) -> bool:
    """Replace the function in litellm's module, if it is what we know."""
    global _original, _replacement, _reason
    with _lock:
        if _replacement is not None and getattr(module, _FUNCTION, None) is _replacement:
            return True
        original = getattr(module, _FUNCTION, None)
        if not isinstance(original, FunctionType) or original.__module__ != _MODULE:
            _reason = _unsupported()
            logging.getLogger("fast_litellm_shm").warning("%s", _reason)
            return False
        _original, _replacement = original, _make_replacement(original)
        setattr(module, _FUNCTION, _replacement)
        _reason = None
        return True


# when litellm is imported later ------------------------------------------------------------------


class _Finder:
    """Patches the module when it is imported: finds it as all others do, and has its own loader go
    on to apply_acceleration(). Only for this one name, and until then."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        loader: Any = spec.loader if spec is not None else None
        run = getattr(loader, "exec_module", None)
        if run is None:
            return spec

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            _disarm()
            try:
                apply_acceleration()
            except Exception:  # litellm's import must not fail for our sake
                logging.getLogger("fast_litellm_shm").exception("cannot accelerate litellm")

        try:
            loader.exec_module = exec_module
        except AttributeError:
            logging.getLogger("fast_litellm_shm").warning(
                "litellm is not accelerated: its loader %r cannot be followed", loader
            )
        return spec


_finder: Any = _Finder()


def _arm() -> None:
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _disarm() -> None:
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


# the API -----------------------------------------------------------------------------------------


def apply_acceleration() -> bool:
    """Put the shared memo under ``litellm.token_counter``: now, or as soon as litellm is imported,
    which this does not do: it looks into litellm's source. True if so; False where litellm is not
    installed, FAST_LITELLM_ENABLED is false, or this litellm is none that is known (1.102.0 and
    later are); ``get_patch_status()["reason"]`` says which.

    Called on import of fast_litellm_shm. Calling it again is harmless.
    """
    global _reason
    with _lock:
        if not settings.all_enabled():
            _reason = "FAST_LITELLM_ENABLED is false"
            return False
        module = sys.modules.get(_MODULE)
        if module is not None:
            return _patch(module)
        _arm()
        missing = _missing()
        _reason = missing or "litellm is not imported yet"
        return missing is None


def remove_acceleration() -> None:
    """Put back the very object that was there. Where somebody has replaced it after us, theirs
    stays, and ours in it passes everything on. Calling it again is harmless."""
    global _original, _replacement, _reason
    with _lock:
        _disarm()
        module = sys.modules.get(_MODULE)
        if _replacement is not None and getattr(module, _FUNCTION, None) is _replacement:
            setattr(module, _FUNCTION, _original)
        _original = _replacement = None
        _memos.clear()
        _free_ids.clear()
        _reason = "it was removed by remove_acceleration()"


def get_patch_status() -> dict[str, Any]:
    """applied (whether litellm is patched now), components (which parts: ``token_counting``), and
    reason (None, or why it is not)."""
    module = sys.modules.get(_MODULE)
    applied = _replacement is not None and getattr(module, _FUNCTION, None) is _replacement
    reason = _reason
    if not applied and reason is None:
        reason = f"somebody else has replaced {_MODULE}.{_FUNCTION}"
    elif not settings.all_enabled():
        reason = "FAST_LITELLM_ENABLED is false"
    elif not applied and _MODULE not in sys.modules:
        reason = _missing() or reason
    return {"applied": applied, "components": [_COMPONENT] if applied else [], "reason": reason}


def _unsupported() -> str:
    return (
        f"litellm {_version('litellm')} has no function {_MODULE}.{_FUNCTION}, so it is left as it "
        f"is; {_SINCE} and later have it"
    )


def _missing() -> str | None:
    """What the litellm that would be imported lacks. Read in its source, since an import takes
    seconds, and a version is only a number; None where the source is no file that can be read."""
    try:
        spec = importlib.util.find_spec("litellm")
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return "litellm is not installed"
    for folder in spec.submodule_search_locations or ():
        source = os.path.join(folder, *_MODULE.split(".")[1:]) + ".py"
        try:
            with open(source, encoding="utf-8") as file:
                return None if f"def {_FUNCTION}(" in file.read() else _unsupported()
        except FileNotFoundError:
            return _unsupported()
        except (OSError, ValueError):
            break
    return None


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()  # whoever held it does not live in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def on_import() -> None:
    """apply_acceleration(), without a look at the disk: what the package does when it is imported.
    The settings are read when litellm is imported."""
    try:
        if _MODULE in sys.modules:
            apply_acceleration()
        else:
            _arm()
    except Exception:  # importing this package must not fail for litellm's sake
        logging.getLogger("fast_litellm_shm").exception("cannot accelerate litellm")
