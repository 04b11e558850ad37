"""Settings from the environment. Read when they are needed, never at import."""

from __future__ import annotations

import os

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
            f"FAST_LITELLM_SHM_MODE must be octal permission bits that let the owner read and write, "
            f"such as 0600 or 0660, not {text!r}"
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
