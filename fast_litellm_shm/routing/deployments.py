"""LiteLLM's model lists: the entries of a model, and each one's name, weight and price. An error
names the position and the field."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fast_litellm_shm._shared.native import lib

COST_UNIT = 1e9
_WEIGHTS = ("weight", "rpm", "tpm")  # the first of these that any deployment has is used
_PRICES = ("input_cost_per_token", "output_cost_per_token")


def number(where: str, field: str, value: object) -> float | None:
    """A number of 0 or more, or None. Text such as "1e-6" is accepted: YAML reads 1e-6 as text."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        kind = ValueError if isinstance(value, (int, float, str)) else TypeError
        raise kind(f"{where}: {field} must be a number of 0 or more, not {value!r}")
    return number


def _mapping(where: str, field: str, value: object) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise TypeError(f"{where}: {field} must be a dict, not {value!r}")


def _text(where: str, field: str, found: Mapping[str, Any], key: str) -> str:
    value = found.get(key)
    if isinstance(value, str):
        return str.__str__(value)  # a subclass becomes a plain str
    if value is None:
        raise ValueError(f"{where}: {field} is missing")
    raise TypeError(f"{where}: {field} must be a str, not {value!r}")


def name_of_model(where: str, deployment: object) -> str:
    return _text(where, "model_name", _mapping(where, "a deployment", deployment), "model_name")


class Deployment:
    """One entry of a model list, checked. where: its name in errors."""

    __slots__ = ("identity", "info", "model", "model_name", "params", "where")

    params: Mapping[str, Any]
    info: Mapping[str, Any]

    def __init__(self, where: str, deployment: Mapping[str, Any], model_name: str) -> None:
        self.where, self.model_name = where, model_name
        params, info = deployment.get("litellm_params"), deployment.get("model_info")
        if type(params) is not dict:  # faster than isinstance(params, Mapping)
            if "litellm_params" not in deployment:
                raise ValueError(f"{where}: litellm_params is missing")
            params = _mapping(where, "litellm_params", params)
        self.params = params
        model = params.get("model")
        self.model: str = (
            model if type(model) is str else _text(where, "litellm_params.model", params, "model")
        )
        if type(info) is not dict:
            info = {} if info is None else _mapping(where, "model_info", info)
        self.info = info
        identity = info.get("id")
        if type(identity) is not str and identity is not None:
            if isinstance(identity, bool) or not isinstance(identity, (str, int)):
                raise TypeError(f"{where}: model_info.id must be a str, not {identity!r}")
            identity = f"{identity}" if isinstance(identity, int) else str.__str__(identity)
        self.identity: str | None = identity

    def names(self) -> tuple[str, ...]:
        """The names in blocked_models that block it."""
        if self.identity is None:
            return self.model_name, self.model
        return self.model_name, self.model, self.identity

    def weight(self, field: str) -> float:
        return number(self.where, f"litellm_params.{field}", self.params.get(field)) or 0.0

    def price(self) -> float:
        """The price of an input and an output token together, in 1e-9; -1: unknown."""
        for place, found in (("litellm_params", self.params), ("model_info", self.info)):
            prices = [number(self.where, f"{place}.{f}", found.get(f)) for f in _PRICES]
            if any(price is not None for price in prices):
                return sum(price or 0.0 for price in prices) * COST_UNIT
        return -1.0

    def name(self, handle: Any) -> str:
        """model_info.id, else the model and a keyed hash of all parameters. They contain API keys:
        the hash does not reveal them without the segment, which has its secret."""
        if self.identity is not None:
            return self.identity
        try:
            text = json.dumps(
                [self.model_name, dict(self.params)],
                sort_keys=True,
                default=lambda value: f"{type(value).__module__}.{type(value).__qualname__}",
            )
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{self.where}: litellm_params cannot be hashed ({error}); give it a model_info.id"
            ) from None
        raw = text.encode()
        return f"{self.model}#{lib.fshm_deployment_id(handle, raw, len(raw)):016x}"


def those_of(model_list: list[Any], model: str) -> list[tuple[int, Deployment]]:
    """The deployments of a model, with their positions. Other entries: only the name is checked."""
    out = []
    for position, deployment in enumerate(model_list):
        name = deployment.get("model_name") if type(deployment) is dict else None
        if type(name) is not str:
            name = name_of_model(f"model_list[{position}]", deployment)
        if name == model:
            out.append((position, Deployment(f"model_list[{position}]", deployment, name)))
    return out


def weights_of(found: list[tuple[int, Deployment]]) -> list[float]:
    for field in _WEIGHTS:
        if any(deployment.params.get(field) is not None for _, deployment in found):
            weights = [deployment.weight(field) for _, deployment in found]
            if any(weights):
                return weights
    return [1.0] * len(found)


def _names(blocked: Iterable[Any]) -> Iterator[str]:
    for i, name in enumerate(blocked):
        if not isinstance(name, str):
            raise TypeError(f"blocked_models[{i}] must be a str, not {name!r}")
        yield str.__str__(name)


def choose_plainly(model_list: Any, model: str, blocked: Any) -> Any:
    """A deployment of the model that is not blocked, at random. Raises as the native part does."""
    if not isinstance(model, str):
        raise TypeError(f"model must be a str, not {model!r}")
    if isinstance(model_list, (str, bytes, dict)) or not isinstance(model_list, Iterable):
        raise TypeError(f"model_list must be a list of deployments, not {model_list!r}")
    if blocked is None:
        blocked = ()
    if isinstance(blocked, (str, bytes)) or not isinstance(blocked, Iterable):
        raise TypeError(f"blocked_models must be a list of names, not {blocked!r}")
    model_list, names = list(model_list), frozenset(_names(blocked))
    fit = [
        model_list[position]
        for position, deployment in those_of(model_list, model)
        if not names.intersection(deployment.names())
    ]
    return random.choice(fit) if fit else None
