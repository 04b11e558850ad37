"""Settings from the environment. Read when they are needed, never at import."""

from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm._shared.native import lib

_warned: set[str] = set()


def segment_name() -> str:
    """FAST_LITELLM_SHM_NAME, else a name for each user id."""
    return os.environ.get("FAST_LITELLM_SHM_NAME") or f"uid{os.geteuid()}"


def segment_capacity() -> int | None:
    """FAST_LITELLM_SHM_CAPACITY: keys; None where it is not set."""
    text = os.environ.get("FAST_LITELLM_SHM_CAPACITY")
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"FAST_LITELLM_SHM_CAPACITY must be a whole number of keys, not {text!r}"
        ) from None


def segment_mode() -> int:
    """FAST_LITELLM_SHM_MODE: permission bits in octal, 0600 by default."""
    text = os.environ.get("FAST_LITELLM_SHM_MODE") or "0600"
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0o600 <= mode <= 0o777 or mode & 0o600 != 0o600:
        raise ValueError(
            f"FAST_LITELLM_SHM_MODE must be octal permission bits that let the owner read and "
            f"write, such as 0600 or 0660, not {text!r}"
        )
    return mode


def segment_names() -> str:
    """FAST_LITELLM_SHM_NAMES: plain (default), hashed or off."""
    return os.environ.get("FAST_LITELLM_SHM_NAMES") or "plain"


def names_flag(names: str) -> int:
    """The open flag for how key names are kept."""
    flags = {"plain": 0, "hashed": lib.FSHM_NAMES_HASHED, "off": lib.FSHM_NAMES_OFF}
    if names not in flags:
        raise ValueError(f"names must be 'plain', 'hashed' or 'off', not {names!r}")
    return int(flags[names])


def cluster_url() -> str | None:
    """FAST_LITELLM_SHM_CLUSTER: the server of limits over many hosts; None where it is not set."""
    return os.environ.get("FAST_LITELLM_SHM_CLUSTER") or None


def names_server(given: object) -> bool:
    """Whether limits are to hold over many hosts, by an argument ``cluster`` or by the variable."""
    return given is not False and (given is not None or cluster_url() is not None)


def warn_not_shared(what: str, chosen: str | None) -> None:
    """Where limits are to hold over many hosts, say once that these do not. chosen: the server that
    a setting names beside the variable."""
    if chosen is not None or cluster_url() is not None:
        name = "FAST_LITELLM_SHM_CLUSTER" if chosen is None else "cluster"
        warn_once(f"{name} is set, and {what} counts on this host alone: see docs/cluster.md")


def cluster_outage() -> str | None:
    """FAST_LITELLM_SHM_CLUSTER_OUTAGE: local, deny or allow; None where it is not set."""
    return os.environ.get("FAST_LITELLM_SHM_CLUSTER_OUTAGE") or None


def cluster_timeout() -> float | None:
    """FAST_LITELLM_SHM_CLUSTER_TIMEOUT: seconds; None where it is not set."""
    text = os.environ.get("FAST_LITELLM_SHM_CLUSTER_TIMEOUT")
    return None if not text else float(_number("FAST_LITELLM_SHM_CLUSTER_TIMEOUT", text, False))


def cluster_password() -> str | None:
    """FAST_LITELLM_SHM_CLUSTER_PASSWORD, or what is in the file that
    FAST_LITELLM_SHM_CLUSTER_PASSWORD_FILE names: for a URL that has none. None: neither is set."""
    given = os.environ.get("FAST_LITELLM_SHM_CLUSTER_PASSWORD")
    path = os.environ.get("FAST_LITELLM_SHM_CLUSTER_PASSWORD_FILE")
    if given and path:
        raise ValueError(
            "FAST_LITELLM_SHM_CLUSTER_PASSWORD and FAST_LITELLM_SHM_CLUSTER_PASSWORD_FILE are both "
            "set: unset one"
        )
    if not path:
        return given or None
    try:
        with open(path, encoding="utf-8") as file:
            found = file.read().rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"FAST_LITELLM_SHM_CLUSTER_PASSWORD_FILE: cannot read {path!r}: "
            f"{error.strerror if isinstance(error, OSError) else 'it is not UTF-8'}"
        ) from None
    if not found:
        raise ValueError(f"FAST_LITELLM_SHM_CLUSTER_PASSWORD_FILE: {path!r} is empty")
    return found


@dataclass(frozen=True)
class PoolDefaults:
    """What a connection pool is limited to where its constructor says nothing."""

    max_per_endpoint: int = 10
    max_total: int = 100
    idle_timeout: float = 300.0


def _number(source: str, value: Any, whole: bool) -> Any:
    try:
        number = int(value) if whole else float(value)
    except (TypeError, ValueError):
        number = 0
    if number <= 0 or isinstance(value, bool):
        raise ValueError(f"{source} must be a positive number, not {value!r}")
    return number


def feature_config() -> tuple[str, dict[str, Any]]:
    """The file that FAST_LITELLM_FEATURE_CONFIG names, and what is in it; ("", {}) without one."""
    path = os.environ.get("FAST_LITELLM_FEATURE_CONFIG")
    if not path:
        return "", {}
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"FAST_LITELLM_FEATURE_CONFIG: cannot read {path!r} as JSON: {error}"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"FAST_LITELLM_FEATURE_CONFIG: {path!r} must hold a JSON object")
    return path, found


def warn_once(message: str) -> None:
    """Say it by warnings and in the log, once in a process: what goes wrong in a setting must be
    seen, and must not stop a worker."""
    if message in _warned:
        return
    _warned.add(message)
    logging.getLogger("fast_litellm_shm").warning("%s", message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def config_or_warning() -> tuple[str, dict[str, Any]]:
    """:func:`feature_config`; where that file is broken, a warning, and as if there were none."""
    try:
        return feature_config()
    except ValueError as error:
        warn_once(f"{error}; the defaults apply")
        return "", {}


def pool_defaults() -> PoolDefaults:
    """From the environment, else from the config file (``features.rust_connection_pool.config``),
    else 10 to an endpoint, 100 in all, 300 s idle."""
    path, config = feature_config()
    where = "features.rust_connection_pool.config"
    inner: Any = config
    for part in where.split("."):
        inner = inner.get(part, {}) if isinstance(inner, dict) else {}
    found: dict[str, Any] = {}
    for field, suffix, key, whole in (
        ("max_per_endpoint", "MAX_PER_ENDPOINT", "max_connections_per_endpoint", True),
        ("max_total", "MAX_TOTAL", "max_total_connections", True),
        ("idle_timeout", "IDLE_TIMEOUT", "idle_timeout_seconds", False),
    ):
        variable = f"FAST_LITELLM_POOL_{suffix}"
        if os.environ.get(variable):
            found[field] = _number(variable, os.environ[variable], whole)
        elif isinstance(inner, dict) and key in inner:
            found[field] = _number(f"{path}: {where}.{key}", inner[key], whole)
    return PoolDefaults(**found)


@dataclass(frozen=True)
class RateDefaults:
    """What :func:`fast_litellm_shm.check_rate_limit` limits a key to, beside 10 a second and 10,000
    an hour."""

    requests_per_minute: int = 600
    burst_size: int = 20


_MOST_REQUESTS = 1_000_000


def rate_defaults() -> RateDefaults:
    """From the config file (``features.rust_rate_limiting.config``), else 600 a minute and a burst
    of 20. What is wrong is told by a warning, once, and counts as not given: a broken file must
    not stop requests."""
    path, config = config_or_warning()
    where = "features.rust_rate_limiting.config"
    inner: Any = config
    for part in where.split("."):
        inner = inner.get(part, {}) if isinstance(inner, dict) else {}
    found: dict[str, int] = {}
    for key in ("requests_per_minute", "burst_size"):
        if not isinstance(inner, dict) or key not in inner:
            continue
        value = inner[key]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and 1 <= value <= _MOST_REQUESTS:
            found[key] = value
        else:
            warn_once(
                f"{path}: {where}.{key} must be a whole number from 1 to {_MOST_REQUESTS}, not "
                f"{value!r}; {getattr(RateDefaults, key)} is used"
            )
    return RateDefaults(**found)


def all_enabled() -> bool:
    """FAST_LITELLM_ENABLED: false switches off whatever only makes things faster."""
    word = os.environ.get("FAST_LITELLM_ENABLED", "").strip().lower()
    return word not in ("false", "disabled", "off", "no", "0")


def prices_file() -> str | None:
    """FAST_LITELLM_PRICES: a JSON file of the user's own prices; None where it is not set."""
    return os.environ.get("FAST_LITELLM_PRICES") or None


def tokenizer_download() -> bool:
    """FAST_LITELLM_TOKENIZER_DOWNLOAD: whether tiktoken may download an encoding's file that is not
    on this machine; true by default."""
    text = os.environ.get("FAST_LITELLM_TOKENIZER_DOWNLOAD") or "true"
    if text.lower() not in ("true", "false"):
        raise ValueError(f"FAST_LITELLM_TOKENIZER_DOWNLOAD must be true or false, not {text!r}")
    return text.lower() == "true"
