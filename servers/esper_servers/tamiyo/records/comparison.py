"""Where two messages of one type differ, bit for bit, named field by field."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from google.protobuf.message import Message

from esper_rpc.proto.tamiyo.v1 import NumberArray

from .arrays import read_array


def differences(
    recorded: Message, now: Message, *, skip: AbstractSet[str] = frozenset(), prefix: str = ""
) -> Iterator[str]:
    """Yield a sentence for each difference; `skip` names fields and entries of maps by their path."""
    for field in recorded.DESCRIPTOR.fields:
        path = prefix + field.name
        if path in skip:
            continue
        if _is_map(field):
            ours, theirs = getattr(recorded, field.name), getattr(now, field.name)
            for key in (key for key in sorted({*ours, *theirs}) if f"{path}.{key}" not in skip):
                yield from _values(f"{path}.{key}", _item(ours, key), _item(theirs, key), skip, field)
        else:
            yield from _values(path, _value(recorded, field), _value(now, field), skip, field)


def _values(path: str, ours: Any, theirs: Any, skip: AbstractSet[str], field: Any) -> Iterator[str]:
    if isinstance(ours, NumberArray) and isinstance(theirs, NumberArray):
        yield from _arrays(path, ours, theirs)
    elif isinstance(ours, Message) and isinstance(theirs, Message):
        yield from differences(ours, theirs, skip=skip, prefix=f"{path}.")
    elif isinstance(ours, Message):
        yield f"{path}: recorded one, now nothing"
        yield from differences(ours, type(ours)(), skip=skip, prefix=f"{path}.")
    elif isinstance(theirs, Message):
        yield f"{path}: recorded nothing, now one"
        yield from differences(type(theirs)(), theirs, skip=skip, prefix=f"{path}.")
    elif not _equal(ours, theirs):
        yield f"{path}: recorded {_text(ours, field)}, now {_text(theirs, field)}"


def _arrays(path: str, ours: NumberArray, theirs: NumberArray) -> Iterator[str]:
    if (ours.dtype, list(ours.shape)) != (theirs.dtype, list(theirs.shape)):
        yield f"{path}: recorded {ours.dtype} {list(ours.shape)}, now {theirs.dtype} {list(theirs.shape)}"
    elif ours.values != theirs.values:
        yield f"{path}: {_first_difference(read_array(ours), read_array(theirs))}"


def _first_difference(ours: Any, theirs: Any) -> str:
    size = ours.dtype.itemsize
    unequal = (ours.reshape(-1).view(np.uint8) != theirs.reshape(-1).view(np.uint8)).reshape(-1, size).any(axis=1)
    first = int(unequal.argmax())
    place = [int(i) for i in np.unravel_index(first, ours.shape)]
    told = f"{int(unequal.sum())} of {unequal.size} values, first at {place}"
    return f"{told}: recorded {ours.flat[first]}, now {theirs.flat[first]}"


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _value(message: Message, field: Any) -> Any:
    """The value of a field; None for one that knows it is not set."""
    if field.has_presence and not message.HasField(field.name):
        return None
    found = getattr(message, field.name)
    return list(found) if field.is_repeated else found


def _item(values: Any, key: Any) -> Any:
    # To ask a map of messages for a key makes it.
    return values[key] if key in values else None  # noqa: SIM401


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return struct.pack("<d", ours) == struct.pack("<d", theirs)
    return bool(ours == theirs)


def _text(value: Any, field: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bytes):
        return value.hex() or "nothing"
    if field.enum_type is not None and value in field.enum_type.values_by_number:
        return str(field.enum_type.values_by_number[value].name)
    return str(value) if isinstance(value, Message) else repr(value)
