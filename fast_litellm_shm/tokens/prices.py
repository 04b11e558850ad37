"""Prices and limits of models, from litellm's price map and the user's own file. A model that is in
neither has no price.

litellm's map is read from its file, if litellm is installed; litellm is not imported. The file that
FAST_LITELLM_PRICES names is a JSON object of the same form. Its models replace those of litellm:

    {"my-model": {"input_cost_per_token": 2e-6, "output_cost_per_token": 8e-6,
                  "max_input_tokens": 32000, "max_output_tokens": 4096}}
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from fast_litellm_shm._shared import log, settings
from fast_litellm_shm.exceptions import PriceFileError, UnknownModelError
from fast_litellm_shm.limits import check_tokens
from fast_litellm_shm.tokens import encoding

_FILE = "model_prices_and_context_window_backup.json"
_NO_MODEL = "sample_spec"  # the entry of litellm's map that documents it
_ABOVE = re.compile(r"input_cost_per_token_above_(\d+)(k?)_tokens")
_INCLUSIVE = ("xai",)  # providers whose higher price begins at the threshold, not above it

Entry = Mapping[str, Any]


class _Map(NamedTuple):
    user_file: str | None  # FAST_LITELLM_PRICES when this was read
    models: Mapping[str, Entry]
    source: str | None
    error: str | None = None


_lock = threading.Lock()
_map: _Map | None = None
_lookup_failures = 0


# the files ---------------------------------------------------------------------------------------


def _read(path: str) -> dict[str, Entry]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise PriceFileError(f"cannot read the price map {path!r} as JSON: {error}") from None
    if not isinstance(found, dict):
        raise PriceFileError(f"the price map {path!r} must hold a JSON object, by model")
    for model, entry in found.items():
        if not isinstance(entry, dict):
            raise PriceFileError(
                f"the price map {path!r}: {model!r} must be a JSON object, not {entry!r}"
            )
    found.pop(_NO_MODEL, None)
    return found


def _follow_aliases(models: dict[str, Entry]) -> None:
    """Resolve the other names of models: entries with ``alias_of``, and lists of ``aliases``. A
    name whose model is missing is dropped."""
    for model, entry in list(models.items()):
        target = entry.get("alias_of")
        if target is not None:
            found = models.get(target) if isinstance(target, str) else None
            if found is None or "alias_of" in found:
                del models[model]
            else:
                models[model] = found
        others = entry.get("aliases")
        for other in others if isinstance(others, list) else ():
            if isinstance(other, str):
                models.setdefault(other, entry)


def _load(user_file: str | None) -> _Map:
    models: dict[str, Entry] = {}
    sources, error = [], None
    folder = encoding.litellm_folder()
    path = os.path.join(folder, _FILE) if folder else ""
    if os.path.exists(path):
        try:
            models.update(_read(path))
            sources.append(path)
        except PriceFileError as found:
            error = str(found)
            log.warning("%s; it is left out", error)
    if user_file:
        try:
            models.update(_read(user_file))
            sources.append(user_file)
        except PriceFileError as found:
            return _Map(user_file, {}, None, f"FAST_LITELLM_PRICES: {found}")
    _follow_aliases(models)
    return _Map(user_file, models, " and ".join(sources) or None, error)


def _loaded() -> _Map:
    """The price map: read at the first use, and again when FAST_LITELLM_PRICES has changed."""
    global _map
    user_file = settings.prices_file()
    found = _map
    if found is None or found.user_file != user_file:
        with _lock:
            found = _map
            if found is None or found.user_file != user_file:
                found = _map = _load(user_file)
    return found


def _prices() -> _Map:
    found = _loaded()
    if found.user_file and found.error and not found.models:
        raise PriceFileError(found.error)
    return found


# looking up --------------------------------------------------------------------------------------


def _of_provider(entry: Entry, prefix: str) -> bool:
    """Whether the entry is of that provider: `azure/x` does not have the price of OpenAI's `x`."""
    provider = str(entry.get("litellm_provider", ""))
    return (
        provider == prefix
        or provider.startswith((f"{prefix}-", f"{prefix}_"))
        or provider == f"text-completion-{prefix}"
    )


def find(model: str) -> Entry | None:
    """The entry of a model, or None. Found by its whole name, else without its provider if the
    entry is of that provider (``openai/gpt-4o``), else by the base of a fine-tuned model."""
    if not isinstance(model, str):
        raise TypeError(f"model must be a str, not {model!r}")
    models = _prices().models
    names = [model]
    if ":" in model:
        start = model.find("ft:")
        if start >= 0 and (start == 0 or model[start - 1] == "/"):
            names.append(":".join(model.split(":")[:2]))  # ft:base:organization:name:id
    for name in names:
        if name in models:
            return models[name]
        prefix, slash, rest = name.partition("/")
        if slash and rest in models and _of_provider(models[rest], prefix):
            return models[rest]
    return None


def _known(model: str) -> Entry:
    global _lookup_failures
    entry = find(model)
    if entry is None:
        _lookup_failures += 1
        source = _prices().source
        where = (
            f"is not in {source}; name its price in a file"
            if source
            else "has no known price: install litellm, which has prices, or name it in a file"
        )
        raise UnknownModelError(
            f"the model {model!r} {where}, and set FAST_LITELLM_PRICES to that file"
        )
    return entry


def _price(model: str, entry: Entry, field: str) -> float | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
        raise PriceFileError(
            f"{field} of {model!r} must be dollars a token, 0 or more, not {value!r} (in "
            f"{_prices().source})"
        )
    return float(value)


def _range(model: str, tier: Any) -> tuple[float, float] | None:
    """The tokens above which, and up to which, a tier applies; None where it does not say."""
    if not isinstance(tier, dict) or "range" in tier:
        bounds: Any = tier["range"] if isinstance(tier, dict) else None
        numbers = isinstance(bounds, list) and all(type(each) in (int, float) for each in bounds)
        if not numbers or len(bounds) != 2:
            raise PriceFileError(
                f"tiered_pricing of {model!r} must be a list of objects with a range of two "
                f"numbers, not {tier!r} (in {_prices().source})"
            )
        return bounds[0], bounds[1]
    return None


def _tier(model: str, entry: Entry, input_tokens: int) -> Entry:
    """The entry with the price that applies to so many tokens, where it has tiers."""
    tiers = entry.get("tiered_pricing")
    if isinstance(tiers, list) and input_tokens > 0:
        found_ranges = ((_range(model, tier), tier) for tier in tiers)
        ranged = sorted(
            ((bounds, tier) for bounds, tier in found_ranges if bounds is not None),
            key=lambda pair: pair[0][0],
        )
        for (above, upto), tier in ranged:
            if above < input_tokens <= upto:
                return {**entry, **tier}
        if ranged:
            return {**entry, **ranged[-1][1]}
    reached, found = 0, entry
    for field in entry:
        match = _ABOVE.fullmatch(field)
        if match is None or entry[field] is None:
            continue
        threshold = int(match[1]) * (1000 if match[2] else 1)
        inclusive = entry.get("litellm_provider") in _INCLUSIVE
        if threshold > reached and input_tokens + inclusive > threshold:
            output = entry.get(field.replace("input", "output", 1))
            found = {**entry, "input_cost_per_token": entry[field]}
            if output is not None:
                found["output_cost_per_token"] = output
            reached = threshold
    return found


def estimate_cost(input_tokens: int, output_tokens: int, model: str) -> float:
    """The cost of a request in dollars, at the model's standard price: with the higher price of
    long input where the model has one, without discounts for cached input, batches or hours.

    Raises UnknownModelError for a model without a known price, ValueError or TypeError for tokens
    that are not whole numbers of 0 or more, PriceFileError for a price file that cannot be read.
    """
    check_tokens("input_tokens", input_tokens)
    check_tokens("output_tokens", output_tokens)
    entry = _tier(model, _known(model), input_tokens)
    total = 0.0
    for what, tokens in (("input", input_tokens), ("output", output_tokens)):
        price = _price(model, entry, f"{what}_cost_per_token")
        if price is not None:
            total += tokens * price
        elif tokens:
            raise UnknownModelError(
                f"{_prices().source} has {model!r}, but no price per token of its {what}"
            )
    return total


def limits(model: str) -> dict[str, int | None] | None:
    """``context_window``, ``max_input_tokens``, ``max_output_tokens`` of a model, each None where
    the map does not say; None for a model that is not in it."""
    global _lookup_failures
    entry = find(model)
    if entry is None:
        _lookup_failures += 1
        return None
    found: dict[str, int | None] = {}
    for field in ("max_tokens", "max_input_tokens", "max_output_tokens"):
        value = entry.get(field)
        whole = isinstance(value, (int, float)) and value == value // 1 and value >= 0
        found[field] = int(value) if whole and value is not None else None
    most = found.pop("max_tokens")
    if found["max_input_tokens"] is None:
        found["max_input_tokens"] = most
    return {"context_window": found["max_input_tokens"], **found}


def get_pricing_status() -> dict[str, Any]:
    """json_loaded (whether there is a price map; this call reads it if need be), models_loaded,
    lookup_failures (look-ups in this process that found no model), source (the files), error (why a
    file could not be read, or None)."""
    found = _loaded()
    return {
        "json_loaded": bool(found.models),
        "models_loaded": len(found.models),
        "lookup_failures": _lookup_failures,
        "source": found.source,
        "error": found.error,
    }


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # the thread that held it does not live in the child


os.register_at_fork(after_in_child=_renew_lock)
