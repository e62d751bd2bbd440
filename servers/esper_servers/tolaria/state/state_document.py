"""A nested state as JSON and named tensors, and back. Nothing is pickled, so that reading it executes nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from esper_rpc.errors import InvalidRequest

from . import tensor_file

_PLAIN = (str, bool, int, type(None))


def flatten(name: str, state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a state as JSON, and its tensors by the names that the JSON has for them; raises InvalidRequest."""
    tensors: dict[str, Tensor] = {}
    return _encode(state, name, tensors), tensors


def rebuild(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state that `flatten` was given; raises KeyError, TypeError or ValueError for another document."""
    if isinstance(document, list):
        return [rebuild(each, tensors) for each in document]
    if not isinstance(document, dict):
        return document
    tag = next((key for key in document if key.startswith("$")), None)
    if tag is None:
        return {key: rebuild(value, tensors) for key, value in document.items()}
    return _DECODERS[tag](document[tag], tensors)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return {"$tensor": _keep(value, path, tensors)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, bytes | bytearray):
        return {"$bytes": bytes(value).hex()}
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, tensors)
    if isinstance(value, list | tuple):
        items = [_encode(each, f"{path}.{index}", tensors) for index, each in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise InvalidRequest(f"{path} is a {type(value).__name__}; a checkpoint holds tensors and plain values only.")


def _encode_mapping(value: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    items = [(key, _encode(each, f"{path}.{key}", tensors)) for key, each in value.items()]
    is_counter = isinstance(value, Counter)
    if not is_counter and all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
        return dict(items)
    pairs = [[_encode(key, path, tensors), each] for key, each in items]
    return {"$counter" if is_counter else "$mapping": pairs}


def _keep(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    if not tensor_file.can_hold(tensor):
        raise InvalidRequest(f"{path} is a {tensor.layout} tensor of {tensor.dtype}, which a checkpoint cannot hold.")
    name, again = path, 1
    while name in tensors:
        again += 1
        name = f"{path}#{again}"
    tensors[name] = tensor
    return name


def _pairs(items: Any, tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
    return {rebuild(key, tensors): rebuild(value, tensors) for key, value in items}


_DECODERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "$tensor": lambda name, tensors: tensors[name],
    "$float": lambda text, _: float(text),
    "$bytes": lambda text, _: bytes.fromhex(text),
    "$tuple": lambda items, tensors: tuple(rebuild(each, tensors) for each in items),
    "$mapping": _pairs,
    "$counter": lambda items, tensors: Counter(_pairs(items, tensors)),
}
