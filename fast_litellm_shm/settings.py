"""Settings from the environment. Read when they are needed, never at import."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm.native import lib


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
    except (OSError, ValueError) as error:
        raise ValueError(
            f"FAST_LITELLM_FEATURE_CONFIG: cannot read {path!r} as JSON: {error}"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"FAST_LITELLM_FEATURE_CONFIG: {path!r} must hold a JSON object")
    return path, found


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
