"""Feature flags: which accelerated parts are on, on this host, and for which requests.

A flag is set by its environment variable (``FAST_LITELLM_RUST_ROUTING`` and so on: ``true``,
``false``, ``canary:5``, ``rollout:25``), else by the file that ``FAST_LITELLM_FEATURE_CONFIG``
names, else it is on. ``FAST_LITELLM_ENABLED=false`` switches all of them off. ``canary:N`` and
``rollout:N`` switch it on for N percent of the request ids: the same ids in every process and on
every host, and a larger N keeps those of a smaller one. Calls without a request id: N percent of
them, at random.

Errors are counted for the host. After ``max_errors_before_disable`` (default 10) of them, a feature
is off in all workers, until :func:`reset_errors`.

What a flag switches off:

- ``rust_token_counting``: the engine and the shared memo; tokens are counted by tiktoken alone;
- ``rust_routing``: a router's statistics; it picks any deployment that fits, at random;
- ``rust_rate_limiting``, ``rust_connection_pool``: nothing here; a program may ask for them. Limits
  and pools stay in force: there is no other implementation, and a limit that each worker counts
  alone is no limit;
- ``batch_token_counting``: nothing here; a batch is counted as its texts are.

Settings are parsed when the environment has changed. A changed file is read at the next start, or
after :func:`reload`. A wrong value is a warning, once, and counts as not given.

    >>> import os
    >>> os.environ["FAST_LITELLM_RUST_ROUTING"] = "rollout:25"
    >>> sum(is_enabled("rust_routing", f"request-{i}") for i in range(1000)) in range(200, 300)
    True
    >>> os.environ["FAST_LITELLM_RUST_ROUTING"] = "false"
    >>> is_enabled("rust_routing")
    False
"""

from __future__ import annotations

import array
import hashlib
import os
import random
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import log, settings
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment

# By their numbers in the segment: append only.
FEATURES = (
    "rust_routing",
    "rust_token_counting",
    "rust_rate_limiting",
    "rust_connection_pool",
    "batch_token_counting",
)
ENABLED, DISABLED, CANARY, ROLLOUT = "enabled", "disabled", "canary", "rollout"
AFTER_ERRORS = "disabled_by_errors"

_WORDS = {"true": ENABLED, "enabled": ENABLED, "on": ENABLED, "yes": ENABLED, "1": ENABLED} | {
    "false": DISABLED, "disabled": DISABLED, "off": DISABLED, "no": DISABLED, "0": DISABLED
}  # fmt: skip
_CHOICES = "true, false, canary:N or rollout:N with N from 0 to 100"
# The keys of `config` in the file, which settings.rate_defaults() and pool_defaults() read.
_CONFIG_OF = {
    "rust_rate_limiting": settings.RateDefaults._fields,
    "rust_connection_pool": settings.POOL_KEYS,
}
_NEVER = sys.maxsize  # a number of errors that is never reached
_KEPT = 5  # error messages of each feature, in this process

# The dict of bytes behind os.environ: a look costs a tenth. A changed value is another object.
_raw: dict[bytes, bytes] = getattr(os.environ, "_data", {})
_look = _raw.get if os.name == "posix" and isinstance(_raw, dict) and _raw else os.environb.get
_ENABLED, _CONFIG = b"FAST_LITELLM_ENABLED", b"FAST_LITELLM_FEATURE_CONFIG"


@dataclass(frozen=True, slots=True)
class _Flag:
    """One feature, as parsed from the values of three variables."""

    number: int
    variable: bytes
    enabled: bytes | None  # FAST_LITELLM_ENABLED
    own: bytes | None  # the feature's own variable
    config: bytes | None  # FAST_LITELLM_FEATURE_CONFIG
    state: str
    share: float  # percent
    threshold: int
    errors: Any  # of the host, by number: a memoryview into the segment, or an array
    keeper: Segment | None  # keeps the memory of `errors` mapped


_flags: dict[str, _Flag] = {}
_messages: dict[str, deque[str]] = {name: deque(maxlen=_KEPT) for name in FEATURES}
_errors_here = array.array("Q", [0] * len(FEATURES))  # where no segment can be opened
_open: tuple[Segment, Any] | None = None  # the segment, and the view of its error counts


# settings ----------------------------------------------------------------------------------------


def _number(value: object) -> float:
    """A share in percent; -1 for a value that is none."""
    try:
        number = float(value) if not isinstance(value, bool) else -1.0  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return -1.0
    return number if 0 <= number <= 100 else -1.0


def _from_environment(variable: str, text: str) -> tuple[str, float] | None:
    word, _, number = text.strip().lower().partition(":")
    if word in _WORDS and not _:
        return _WORDS[word], 100.0 if _WORDS[word] == ENABLED else 0.0
    share = _number(number) if word in (CANARY, ROLLOUT) else -1.0
    if share >= 0:
        return word, share
    settings.warn_once(f"{variable} must be {_CHOICES}, not {text!r}; it is ignored")
    return None


def _all_enabled(text: str) -> bool:
    word = _WORDS.get(text.strip().lower())
    if word is None:
        settings.warn_once(
            f"FAST_LITELLM_ENABLED must be true or false, not {text!r}; it is ignored"
        )
    return word != DISABLED


def _from_file(path: str, features: object, name: str) -> tuple[str, float] | None:
    where = f"{path}: features"
    known = settings.known_keys(where, features, FEATURES)
    if name not in known:
        return None
    where = f"{where}.{name}"
    entry = settings.known_keys(where, known[name], ("enabled", "rollout_percentage", "config"))
    if "config" in entry:
        settings.known_keys(f"{where}.config", entry["config"], _CONFIG_OF.get(name, ()))
    enabled = settings.switch(where, entry, "enabled")
    percent = entry.get("rollout_percentage", 100)
    share = _number(percent) if isinstance(percent, (int, float)) else -1.0
    if share < 0:
        settings.warn_once(
            f"{where}.rollout_percentage must be a number from 0 to 100, not {percent!r}; it is "
            "ignored"
        )
        share = 100.0
    if not enabled:
        return DISABLED, 0.0
    return (ENABLED, 100.0) if share == 100 else (ROLLOUT, share)


def _threshold(path: str, config: dict[str, Any]) -> int:
    where = f"{path}: fallback"
    known = ("auto_disable_on_errors", "max_errors_before_disable")
    fallback = settings.known_keys(where, config.get("fallback", {}), known)
    auto = settings.switch(where, fallback, "auto_disable_on_errors")
    most = fallback.get("max_errors_before_disable", 10)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        settings.warn_once(
            f"{where}.max_errors_before_disable must be a whole number of 1 or more, not {most!r}; "
            "10 is used"
        )
        most = 10
    return most if auto else _NEVER


def _load(name: str) -> _Flag:
    """Parse the present settings of one feature."""
    variable = f"FAST_LITELLM_{name.upper()}"
    raw = variable.encode()
    seen = (_look(_ENABLED), _look(raw), _look(_CONFIG))
    path, config = settings.config_or_warning()
    if path:
        config = settings.known_keys(path, config, ("features", "monitoring", "fallback"))
    found = (DISABLED, 0.0) if seen[0] and not _all_enabled(os.fsdecode(seen[0])) else None
    if found is None and seen[1]:
        found = _from_environment(variable, os.fsdecode(seen[1]))
    if found is None:
        found = _from_file(path, config.get("features", {}), name)
    state, share = found or (ENABLED, 100.0)
    threshold = _threshold(path, config)
    keeper, errors = _error_counts()
    flag = _Flag(FEATURES.index(name), raw, *seen, state, share, threshold, errors, keeper)
    _flags[name] = flag
    return flag


def _error_counts() -> tuple[Segment | None, Any]:
    """The default segment and its error counts; where it cannot be opened, this process's own."""
    global _open
    try:
        segment = Segment.default()
    except (exceptions.SegmentError, ValueError) as error:
        settings.warn_once("errors of features are counted in this process only", error)
        return None, _errors_here
    if _open is None or _open[0] is not segment:
        words = lib.fshm_feature_words(segment._handle)
        _open = segment, memoryview(ffi.buffer(words, 8 * len(FEATURES))).cast("Q")
        _flags.clear()
    return _open


def reload() -> None:
    """Read the environment and the file again at the next call, and look for the segment again."""
    global _open
    _open = None
    _flags.clear()


def _flag(name: str) -> _Flag | None:
    if not isinstance(name, str):
        raise TypeError(f"feature_name must be a str, not {name!r}")
    if name in FEATURES:
        return _load(name)
    settings.warn_once(f"there is no feature {name!r}; there are {', '.join(FEATURES)}")
    return None


# queries -----------------------------------------------------------------------------------------


def is_enabled(feature_name: str, request_id: object = None) -> bool:
    """Whether a feature is on for this request. An unknown name: False, and one warning. Raises
    TypeError for a name that is no str."""
    try:
        flag = _flags.get(feature_name)
    except TypeError:  # not hashable: _flag() raises
        flag = None
    if (
        flag is None
        or _look(flag.variable) is not flag.own
        or _look(_ENABLED) is not flag.enabled
        or _look(_CONFIG) is not flag.config
    ):
        flag = _flag(feature_name)
        if flag is None:
            return False
    if flag.errors[flag.number] >= flag.threshold:
        return False
    share = flag.share
    if share >= 100 or share <= 0:
        return share > 0
    if request_id is None:
        return random.random() * 100 < share
    text = f"{feature_name}:{request_id}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") * 100 < share * 2**64


def share_of(feature_name: str) -> float:
    """The percentage of requests for which a feature is on; 0 after too many errors."""
    is_enabled(feature_name)  # reads it anew where something changed
    flag = _flags.get(feature_name) or _flag(feature_name)  # another thread may have cleared them
    if flag is None:
        return 0.0  # an unknown feature
    return 0.0 if flag.errors[flag.number] >= flag.threshold else flag.share


def record_error(feature_name: str, error: BaseException | str) -> None:
    """Count an error of a feature, for the host. The error that reaches the threshold switches the
    feature off in all workers, and is logged."""
    flag = _flag(feature_name)
    if flag is None:
        return
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    _messages[feature_name].append(text)
    segment = _error_counts()[0]
    if segment is None:
        _errors_here[flag.number] += 1
        count = _errors_here[flag.number]
    else:
        count = lib.fshm_feature_error(segment._handle, flag.number)
    if count == flag.threshold:
        log.warning(
            "feature %s is off on this host after %d errors, the last: %s; mend it, then call "
            "reset_errors(%r)",
            feature_name,
            count,
            text,
            feature_name,
        )


def get_feature_status() -> dict[str, dict[str, Any]]:
    """By feature: enabled (for at least some requests), state (``enabled``, ``disabled``,
    ``canary``, ``rollout``, ``disabled_by_errors``), error_count (of the host, since the last
    reset), errors (the last 5 messages of this process), error_threshold (None: errors do not
    switch it off), rollout_percentage."""
    _error_counts()
    out: dict[str, dict[str, Any]] = {}
    for name in FEATURES:
        flag = _load(name)
        count = int(flag.errors[flag.number])
        failed = count >= flag.threshold and flag.state != DISABLED
        out[name] = {
            "enabled": not failed and flag.share > 0,
            "state": AFTER_ERRORS if failed else flag.state,
            "error_count": count,
            "errors": list(_messages[name]),
            "error_threshold": None if flag.threshold == _NEVER else flag.threshold,
            "rollout_percentage": flag.share,
        }
    return out


def reset_errors(feature_name: str | None = None) -> None:
    """Clear the errors of a feature, or of all: it is on again in all workers, if its settings say
    so. Raises ValueError for an unknown name, TypeError for a name that is no str."""
    if feature_name is not None and not isinstance(feature_name, str):
        raise TypeError(f"feature_name must be a str or None, not {feature_name!r}")
    if feature_name is not None and feature_name not in FEATURES:
        raise ValueError(
            f"feature_name must be one of {', '.join(FEATURES)}, or None for all, not "
            f"{feature_name!r}"
        )
    segment = _error_counts()[0]
    for number, name in enumerate(FEATURES):
        if feature_name not in (None, name):
            continue
        _messages[name].clear()
        _errors_here[number] = 0
        if segment is not None:
            lib.fshm_feature_reset(segment._handle, number)
