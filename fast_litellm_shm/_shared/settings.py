"""Settings from the environment. Each is read when it is needed, never at import."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from fast_litellm_shm._shared import log
from fast_litellm_shm._shared.native import lib

_warned: set[tuple[str, type | None]] = set()


def segment_name() -> str:
    """FAST_LITELLM_SHM_NAME, else a name for each group of users (FAST_LITELLM_SHM_GROUP), else for
    each user id."""
    name = os.environ.get("FAST_LITELLM_SHM_NAME")
    if name:
        return name
    group = segment_group()
    return f"uid{os.geteuid()}" if group is None else f"gid{group}"


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


def segment_group() -> int | None:
    """FAST_LITELLM_SHM_GROUP: the group whose users share the segment, by name or number, as a
    number; None where it is not set."""
    text = os.environ.get("FAST_LITELLM_SHM_GROUP")
    return None if not text else check_group("FAST_LITELLM_SHM_GROUP", text)


def check_group(what: str, group: object) -> int:
    """The number of a group. Raises ValueError, which calls it ``what``, or TypeError."""
    if isinstance(group, bool) or not isinstance(group, (int, str)):
        raise TypeError(f"{what} must be the name or the number of a group, not {group!r}")
    if isinstance(group, str) and not group.isdecimal():
        import grp

        try:
            return grp.getgrnam(group).gr_gid
        except (KeyError, ValueError):
            raise ValueError(
                f"{what}: this host has no group {group!r}; make it (groupadd) and add the users "
                "of the workers to it, or give its number"
            ) from None
    number = int(group)
    if not 0 <= number < 2**32 - 1:
        raise ValueError(f"{what} must be the name or the number of a group, not {group!r}")
    return number


def segment_mode(group: int | None = None) -> int:
    """FAST_LITELLM_SHM_MODE: permission bits in octal. By default 0600; 0660 with a group."""
    text = os.environ.get("FAST_LITELLM_SHM_MODE") or ("0600" if group is None else "0660")
    try:
        mode: object = int(text, 8)
    except ValueError:
        mode = text
    return check_mode("FAST_LITELLM_SHM_MODE", mode, repr(text))


def check_mode(what: str, mode: object, shown: str) -> int:
    """The permission bits of a segment. Raises ValueError, which calls them ``what``."""
    if not isinstance(mode, int) or not 0 <= mode <= 0o777 or mode & 0o600 != 0o600:
        raise ValueError(
            f"{what} must be octal permission bits that let the owner read and write, such as 0600 "
            f"or 0660, not {shown}"
        )
    if mode & 0o002:
        raise ValueError(
            f"{what} must not let all users write the segment, as {shown} does: they could change "
            "every limit; use 0660, and a group that the processes share"
        )
    return mode


def allow_other_owner() -> bool:
    """FAST_LITELLM_SHM_ALLOW_OTHER_OWNER: whether to use a segment that another user made; false
    by default."""
    return _boolean("FAST_LITELLM_SHM_ALLOW_OTHER_OWNER", False)


def _boolean(variable: str, default: bool) -> bool:
    text = os.environ.get(variable) or str(default)
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{variable} must be true or false, not {text!r}")
    return text.lower() == "true"


def test_clock() -> str | None:
    """FAST_LITELLM_SHM_TEST_CLOCK: the file of a clock that a test moves, which
    :mod:`fast_litellm_shm.testing` sets; None where it is not set."""
    return os.environ.get("FAST_LITELLM_SHM_TEST_CLOCK") or None


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
    """Whether limits hold over many hosts, by an argument ``cluster`` or by the variable."""
    return given is not False and (given is not None or cluster_url() is not None)


def warn_not_shared(what: str, chosen: str | None) -> None:
    """Warn once that ``what`` counts on this host alone, if the user has set a server. chosen: the
    server that another setting than the variable names."""
    if chosen is not None or cluster_url() is not None:
        name = "FAST_LITELLM_SHM_CLUSTER" if chosen is None else "cluster"
        warn_once(f"{name} is set, and {what} counts on this host alone: see docs/cluster.md")


def cluster_outage() -> str | None:
    """FAST_LITELLM_SHM_CLUSTER_OUTAGE: local, deny or allow; None where it is not set."""
    return _outage("FAST_LITELLM_SHM_CLUSTER_OUTAGE")


def _outage(variable: str) -> str | None:
    found = os.environ.get(variable)
    if found and found not in ("local", "deny", "allow"):
        raise ValueError(f"{variable}: on_outage must be one of local, deny, allow, not {found!r}")
    return found or None


def cluster_timeout() -> float | None:
    """FAST_LITELLM_SHM_CLUSTER_TIMEOUT: seconds; None where it is not set."""
    text = os.environ.get("FAST_LITELLM_SHM_CLUSTER_TIMEOUT")
    return None if not text else float(_number("FAST_LITELLM_SHM_CLUSTER_TIMEOUT", text, False))


def cluster_password() -> str | None:
    """FAST_LITELLM_SHM_CLUSTER_PASSWORD, or the contents of the file that
    FAST_LITELLM_SHM_CLUSTER_PASSWORD_FILE names: for a URL without a password. None: neither is
    set."""
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


class PoolDefaults(NamedTuple):
    """The limits of a connection pool whose constructor is given none."""

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
    """The path of the file that FAST_LITELLM_FEATURE_CONFIG names, and its JSON object; ("", {})
    where none is set."""
    import json

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


def warn_once(message: str, error: Exception | None = None) -> None:
    """Log it and warn, once in a process: a wrong setting must be seen, and must not stop a
    worker. ``error``: why; its text may differ at each time (bytes that are free), so one warning
    for each type of error."""
    told = message, None if error is None else type(error)
    if told in _warned:
        return
    import warnings

    _warned.add(told)
    if error is not None:
        message = f"{message}: {error}"
    log.warning("%s", message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def config_or_warning() -> tuple[str, dict[str, Any]]:
    """:func:`feature_config`. A file that cannot be read is a warning, and counts as none."""
    try:
        return feature_config()
    except ValueError as error:
        warn_once(f"{error}; the defaults apply")
        return "", {}


def known_keys(where: str, found: object, known: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object without unknown keys, and a warning for each; {} for what is no object."""
    if not isinstance(found, dict):
        warn_once(f"{where} must be a JSON object, not {found!r}; it is ignored")
        return {}
    for name in found:
        if name not in known:
            warn_once(
                f"{where}: there is no {name!r}, it is ignored; known are "
                f"{', '.join(known) or 'none'}"
            )
    return {name: value for name, value in found.items() if name in known}


def switch(where: str, found: dict[str, Any], name: str) -> bool:
    """A key that is true or false, true by default; another value is a warning, and ignored."""
    value = found.get(name, True)
    if isinstance(value, bool):
        return value
    warn_once(f"{where}.{name} must be true or false, not {value!r}; it is ignored")
    return True


# The fields of PoolDefaults: each one's variable, its key in the config file, whether it is whole.
_POOL = {
    "max_per_endpoint": ("MAX_PER_ENDPOINT", "max_connections_per_endpoint", True),
    "max_total": ("MAX_TOTAL", "max_total_connections", True),
    "idle_timeout": ("IDLE_TIMEOUT", "idle_timeout_seconds", False),
}
POOL_KEYS = tuple(key for _, key, _ in _POOL.values())


def pool_defaults() -> PoolDefaults:
    """From the environment, else from the config file (``features.rust_connection_pool.config``),
    else 10 to an endpoint, 100 in all, 300 s idle."""
    path, config = feature_config()
    where = "features.rust_connection_pool.config"
    inner = _part(config, where)
    found: dict[str, Any] = {}
    for field, (suffix, key, whole) in _POOL.items():
        variable = f"FAST_LITELLM_POOL_{suffix}"
        if os.environ.get(variable):
            found[field] = _number(variable, os.environ[variable], whole)
        elif key in inner:
            found[field] = _number(f"{path}: {where}.{key}", inner[key], whole)
    return PoolDefaults(**found)


def _part(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The JSON object at a path such as ``features.rust_routing``; {} where there is none."""
    inner: Any = config
    for part in where.split("."):
        inner = inner.get(part) if isinstance(inner, dict) else None
    return inner if isinstance(inner, dict) else {}


class RateDefaults(NamedTuple):
    """The limits of :func:`fast_litellm_shm.check_rate_limit`, beside 10 a second and 10,000 an
    hour."""

    requests_per_minute: int = 600
    burst_size: int = 20


_MOST_REQUESTS = 1_000_000


def rate_defaults() -> RateDefaults:
    """From the config file (``features.rust_rate_limiting.config``), else 600 a minute and a burst
    of 20. A wrong value is a warning, once, and counts as not given: a broken file must not stop
    requests."""
    path, config = config_or_warning()
    where = "features.rust_rate_limiting.config"
    inner = _part(config, where)
    found: dict[str, int] = {}
    for key in RateDefaults._fields:
        if key not in inner:
            continue
        value = inner[key]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and 1 <= value <= _MOST_REQUESTS:
            found[key] = value
        else:
            warn_once(
                f"{path}: {where}.{key} must be a whole number from 1 to {_MOST_REQUESTS}, not "
                f"{value!r}; {RateDefaults._field_defaults[key]} is used"
            )
    return RateDefaults(**found)


def all_enabled() -> bool:
    """FAST_LITELLM_ENABLED: false switches off what only makes things faster."""
    word = os.environ.get("FAST_LITELLM_ENABLED", "").strip().lower()
    return word not in ("false", "disabled", "off", "no", "0")


def prices_file() -> str | None:
    """FAST_LITELLM_PRICES: a JSON file of the user's own prices; None where it is not set."""
    return os.environ.get("FAST_LITELLM_PRICES") or None


def cache_folder() -> str:
    """FAST_LITELLM_SHM_CACHE: where files lie that are made once for a host; else the folder
    fast_litellm_shm in the user's cache (XDG_CACHE_HOME, else ~/.cache)."""
    return os.environ.get("FAST_LITELLM_SHM_CACHE") or _users_folder("XDG_CACHE_HOME", ".cache")


def _users_folder(variable: str, at_home: str) -> str:
    # The specification ignores a relative path.
    users = os.environ.get(variable, "")
    if not os.path.isabs(users):
        users = os.path.join(os.path.expanduser("~"), at_home)
    return os.path.join(users, "fast_litellm_shm")


def state_folder() -> str:
    """FAST_LITELLM_SHM_STATE: where the files of durable limits lie; else the folder
    fast_litellm_shm in the user's state (XDG_STATE_HOME, else ~/.local/state)."""
    found = os.environ.get("FAST_LITELLM_SHM_STATE")
    if found and not os.path.isabs(found):
        raise ValueError(
            f"FAST_LITELLM_SHM_STATE must be an absolute path, not {found!r}: a worker with "
            "another working folder would count in another file"
        )
    return found or _users_folder("XDG_STATE_HOME", ".local/state")


def state_outage() -> str | None:
    """FAST_LITELLM_SHM_STATE_OUTAGE: local, deny or allow; None where it is not set."""
    return _outage("FAST_LITELLM_SHM_STATE_OUTAGE")


def state_timeout() -> float | None:
    """FAST_LITELLM_SHM_STATE_TIMEOUT: seconds; None where it is not set."""
    text = os.environ.get("FAST_LITELLM_SHM_STATE_TIMEOUT")
    return None if not text else float(_number("FAST_LITELLM_SHM_STATE_TIMEOUT", text, False))


def tokenizer_download() -> bool:
    """FAST_LITELLM_TOKENIZER_DOWNLOAD: whether tiktoken may download the file of an encoding that
    is not on this machine; true by default."""
    return _boolean("FAST_LITELLM_TOKENIZER_DOWNLOAD", True)
