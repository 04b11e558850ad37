"""The tiktoken encoding of a model, and the file of an encoding. Each is loaded at first use.

Which encoding a model has is read in tiktoken's source. So a worker that finds the vocabulary file
imports neither tiktoken nor what tiktoken imports.
"""

from __future__ import annotations

import ast
import base64
import functools
import hashlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared import greenlets, settings
from fast_litellm_shm.exceptions import EncodingUnavailableError

if TYPE_CHECKING:
    import tiktoken

DEFAULT = "cl100k_base"

# Models that an older tiktoken's table does not have. All of these families have o200k_base so far.
_NEWER = re.compile(r"(chatgpt-4o|gpt-4o|gpt-4\.[1-9]|gpt-([5-9]|[1-9]\d)|o[1-9]\d?)([.-]|$)")
_CACHE_SETTINGS = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")  # in tiktoken's order
_PROBE_SECONDS = 3.0
_RETRY_SECONDS = 30.0

_lock = greenlets.Lock()  # held over a download
_loaded: dict[str, tiktoken.Encoding] = {}
_failed: dict[str, tuple[float, str]] = {}  # the time of a failed load, and its error


def folders_of(package: str) -> list[str]:
    """Where a package lies; it is not imported. [] where it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a module in sys.modules without a spec
        return []
    return list(spec.submodule_search_locations or ()) if spec else []


def litellm_folder() -> str | None:
    """The folder of litellm, found without importing it; None where it is not installed."""
    return next(iter(folders_of("litellm")), None)


# names -------------------------------------------------------------------------------------------


def _literals(path: str, names: Collection[str]) -> dict[str, ast.Dict]:
    """The dicts of these names that a module makes, in its source; {} where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = ast.parse(file.read()).body
    except (OSError, ValueError, SyntaxError):
        return {}
    found = {}
    for line in lines:
        if isinstance(line, ast.AnnAssign):
            target: ast.expr = line.target
        elif isinstance(line, ast.Assign):
            target = line.targets[0]
        else:
            continue
        if isinstance(target, ast.Name) and target.id in names and isinstance(line.value, ast.Dict):
            found[target.id] = line.value
    return found


@functools.cache
def _tables() -> tuple[dict[str, str], dict[str, str]] | None:
    """tiktoken's two tables, by model and by a prefix of models; None where they cannot be read."""
    names = ("MODEL_TO_ENCODING", "MODEL_PREFIX_TO_ENCODING")
    for folder in folders_of("tiktoken"):
        found = _literals(os.path.join(folder, "model.py"), names)
        try:
            models, prefixes = (ast.literal_eval(found[name]) for name in names)
        except (KeyError, ValueError):
            return None
        return models, prefixes
    return None


@functools.cache
def _names() -> list[str] | None:
    """All encodings, where only tiktoken's own plugin is there and can be read; else None."""
    for folder in (folders := folders_of("tiktoken_ext")):
        if len(folders) > 1 or {*os.listdir(folder)} - {"openai_public.py", "__pycache__"}:
            return None
        found = _literals(os.path.join(folder, "openai_public.py"), ("ENCODING_CONSTRUCTORS",))
        keys = [key for of in found.values() for key in of.keys]
        names = [str(key.value) for key in keys if isinstance(key, ast.Constant)]
        return names if names and len(names) == len(keys) else None
    return None


def _from_table(name: str) -> str | None:
    if (
        "tiktoken" in sys.modules or (tables := _tables()) is None
    ):  # a program may have added models
        from fast_litellm_shm._shared.dependencies import tiktoken

        try:
            return tiktoken.model.encoding_name_for_model(name)
        except KeyError:
            pass
    else:
        models, prefixes = tables
        if name in models:
            return models[name]
        for prefix, found in prefixes.items():
            if name.startswith(prefix):
                return found
    return "o200k_base" if _NEWER.match(name) else None


def name_of(model: str | None, default: str = DEFAULT) -> str:
    """A model's encoding by tiktoken's own table; ``default`` where the table does not have it.

    Prefixes of providers and regions are ignored (``azure/eu/gpt-4o``, ``openai.gpt-oss-120b``). A
    fine-tuned model has the encoding of its base model (``ft:gpt-4.1:team::id``). gpt-4o, gpt-4.1
    and later, and the o-series are o200k_base, even where the table is too old to have them. The
    name of an encoding may stand in place of a model.
    """
    if model is None:
        return default
    if not isinstance(model, str):
        raise TypeError(f"model must be a str or None, not {model!r}")
    last = model.rsplit("/", 1)[-1].removeprefix("openai.")
    if last.startswith("ft:"):
        last = last.split(":")[1]
    found = _from_table(last) or _from_table(model)
    return found or (model if model in names() else default)


def names() -> list[str]:
    """All encodings that tiktoken has."""
    if "tiktoken" not in sys.modules and (found := _names()) is not None:
        return [*found]
    from fast_litellm_shm._shared.dependencies import tiktoken

    return tiktoken.list_encoding_names()


# files -------------------------------------------------------------------------------------------


def _cache_folder() -> str:
    """The folder of tiktoken's cache; "" where it keeps no files."""
    for setting in _CACHE_SETTINGS:
        if setting in os.environ:
            return os.environ[setting]
    import tempfile

    return os.path.join(tempfile.gettempdir(), "data-gym-cache")


def _read(folder: str | None, url: str, expected_hash: str | None) -> bytes | None:
    """A file of tiktoken's from a folder with tiktoken's names; None where it is not there, or
    damaged."""
    if not folder:
        return None
    try:
        with open(os.path.join(folder, hashlib.sha1(url.encode()).hexdigest()), "rb") as file:
            data = file.read()
    except OSError:
        return None
    whole = expected_hash is None or hashlib.sha256(data).hexdigest() == expected_hash
    return data if whole else None


def _tokenizers_of_litellm() -> str | None:
    folder = litellm_folder()
    return folder and os.path.join(folder, "litellm_core_utils", "tokenizers")


def _missing(url: str, why: str) -> EncodingUnavailableError:
    file, name = url.rsplit("/", 1)[-1], hashlib.sha1(url.encode()).hexdigest()
    cache = _cache_folder()
    return EncodingUnavailableError(
        f"tiktoken's file {file} is not on this machine ({why}): `pip install litellm`, whose "
        f"wheel holds the common ones, or download {url} elsewhere and set TIKTOKEN_CACHE_DIR to a "
        f"folder that holds it under the name {name}; looked in "
        f"{' and '.join(filter(None, (cache, _tokenizers_of_litellm()))) or 'no folder'}"
    )


def _check_download(url: str) -> None:
    """Raises where tiktoken's download would fail: tiktoken itself waits without limit."""
    if not settings.tokenizer_download():
        raise _missing(url, "FAST_LITELLM_TOKENIZER_DOWNLOAD is false")
    import urllib.request

    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _missing(url, f"its download fails: {getattr(error, 'reason', error)}") from None


def _patched(originals: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """tiktoken's two functions that read files, but with litellm's folder before the download."""

    def load_tiktoken_bpe(url: str, expected_hash: str | None = None) -> dict[bytes, int]:
        if _read(_cache_folder(), url, expected_hash) is None:
            data = _read(_tokenizers_of_litellm(), url, expected_hash)
            if data is not None:
                pairs = (line.split() for line in data.splitlines() if line)
                return {base64.b64decode(token): int(rank) for token, rank in pairs}
            _check_download(url)
        found: dict[bytes, int] = originals["load_tiktoken_bpe"](url, expected_hash)
        return found

    def data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file: str,
        encoder_json_file: str,
        vocab_bpe_hash: str | None = None,
        encoder_json_hash: str | None = None,
        **options: Any,
    ) -> Any:
        pairs = ((vocab_bpe_file, vocab_bpe_hash), (encoder_json_file, encoder_json_hash))
        for url, expected_hash in pairs:
            if _read(_cache_folder(), url, expected_hash) is None:
                _check_download(url)
        return originals["data_gym_to_mergeable_bpe_ranks"](
            vocab_bpe_file, encoder_json_file, vocab_bpe_hash, encoder_json_hash, **options
        )

    ours = (load_tiktoken_bpe, data_gym_to_mergeable_bpe_ranks)
    return {reader.__name__: reader for reader in ours if reader.__name__ in originals}


def _load(name: str) -> tiktoken.Encoding:
    """Load through tiktoken's own registry, so that a process has each encoding once. tiktoken's
    readers are replaced during the load alone. Another thread that loads meanwhile reads the same
    files, and the environment does not change."""
    from fast_litellm_shm._shared.dependencies import tiktoken

    if name not in names():
        raise ValueError(f"there is no encoding {name!r}; there are {', '.join(sorted(names()))}")
    module: Any = sys.modules.get("tiktoken_ext.openai_public")
    known = ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks")
    originals = {reader: getattr(module, reader) for reader in known if hasattr(module, reader)}
    try:
        for reader, ours in _patched(originals).items():
            setattr(module, reader, ours)
        return tiktoken.get_encoding(name)
    finally:
        for reader, original in originals.items():
            setattr(module, reader, original)


def is_loaded(name: str) -> bool:
    """Whether this process has the encoding already, by load() or by tiktoken itself."""
    registry: Any = sys.modules.get("tiktoken.registry")
    return name in _loaded or name in getattr(registry, "ENCODINGS", ())


def load(name: str) -> tiktoken.Encoding:
    """The encoding of that name. The first call loads it, which takes 0.1 to 1 s.

    Its file comes from TIKTOKEN_CACHE_DIR (or tiktoken's other caches), else from litellm's wheel
    (litellm is not imported), else tiktoken downloads it, unless FAST_LITELLM_TOKENIZER_DOWNLOAD is
    false. Raises EncodingUnavailableError where it cannot be had (remembered for 30 s), and
    ValueError for a name that is no encoding.
    """
    found = _loaded.get(name)
    if found is not None:
        return found
    with _lock:
        if name in _loaded:
            return _loaded[name]
        when, text = _failed.get(name, (-_RETRY_SECONDS, ""))
        if time.monotonic() < when + _RETRY_SECONDS:
            raise EncodingUnavailableError(text)
        try:
            _loaded[name] = _load(name)
        except EncodingUnavailableError as error:
            _failed[name] = time.monotonic(), str(error)
            raise
        except OSError as error:  # of tiktoken's download
            text = f"cannot load the encoding {name}: {error}"
            _failed[name] = time.monotonic(), text
            raise EncodingUnavailableError(text) from error
        _failed.pop(name, None)
        return _loaded[name]


def _renew_lock() -> None:
    global _lock
    _lock = greenlets.Lock()  # the thread that held it does not live in the child


os.register_at_fork(after_in_child=_renew_lock)
