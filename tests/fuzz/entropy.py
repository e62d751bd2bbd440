"""Messages, documents and mutations drawn from bytes, so that the same bytes always give the same input."""

from __future__ import annotations

import json
import math
import random

from google.protobuf.descriptor import FieldDescriptor as F
from google.protobuf.message_factory import GetMessageClass

NASTY_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 1e-45, 3.4028234e38, -3.4028234e38)
NASTY_DOUBLES = (*NASTY_FLOATS, 1e308, -1e308, 5e-324)
NASTY_TEXT = (
    "",
    "run",
    "seed-0",
    "layers.2",
    "*",
    "F",
    "0",
    "-1",
    "\0",
    "ä",
    "\U0001f600",
    "a" * 200,
    "٣",
    "..",
    "'\"",
)
KINDS = {
    F.CPPTYPE_INT32: (0, 31), F.CPPTYPE_INT64: (0, 63), F.CPPTYPE_UINT32: (0, 32), F.CPPTYPE_UINT64: (0, 64),
}  # fmt: skip
MAX_DEPTH = 5


class Entropy:
    """Reads decisions from bytes; what is missing reads as zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def below(self, limit: int) -> int:
        value = self.byte() if limit <= 256 else int.from_bytes(self.take(4), "little")
        return value % limit

    def chance(self, percent: int) -> bool:
        return self.byte() % 100 < percent

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def rest(self) -> bytes:
        return self.take(len(self._data))

    def pick(self, choices):
        return choices[self.below(len(choices))]

    @property
    def is_spent(self) -> bool:
        return self._at >= len(self._data)


def message(entropy, descriptor, depth=0):
    """Draw a message with arbitrary values in arbitrary fields."""
    drawn = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if not entropy.is_spent and entropy.chance(60 if depth else 85):
            _fill(entropy, drawn, field, depth)
    return drawn


def document(entropy, depth=0):
    """Draw what a JSON or TOML document may hold."""
    kind = entropy.below(8 if depth < MAX_DEPTH else 5)
    if kind < 5:
        return (None, entropy.chance(50), entropy.below(2**31) - 2**30, entropy.pick(NASTY_DOUBLES),
                entropy.pick(NASTY_TEXT))[kind]  # fmt: skip
    items = [document(entropy, depth + 1) for _ in range(entropy.below(4))]
    return items if kind == 5 else {entropy.pick(NASTY_TEXT): item for item in items}


def mutate_document(entropy, value):
    """Replace some part of a document by a drawn one."""
    if isinstance(value, dict) and value and not entropy.chance(15):
        key = entropy.pick(sorted(value))
        return {**value, key: mutate_document(entropy, value[key])}
    if isinstance(value, list) and value and not entropy.chance(15):
        index = entropy.below(len(value))
        return [*value[:index], mutate_document(entropy, value[index]), *value[index + 1 :]]
    return document(entropy)


def json_bytes(value) -> bytes:
    """Encode as JSON; NaN and infinities stay, as words that a strict parser refuses."""
    return json.dumps(value).encode()


def mutate_bytes(chance: random.Random, data: bytes, others: list[bytes], limit: int = 4096) -> bytes:
    """Change a few places of an input, or splice it with another."""
    mutable = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(mutable) + 1)
        match chance.randrange(6):
            case 0 if mutable:
                mutable[at % len(mutable)] ^= 1 << chance.randrange(8)
            case 1 if mutable:
                mutable[at % len(mutable)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            case 2:
                mutable[at:at] = chance.randbytes(chance.choice((1, 2, 8, 32)))
            case 3:
                del mutable[at : at + chance.choice((1, 2, 8, 32))]
            case 4:
                other = chance.choice(others)
                mutable[at:] = other[chance.randrange(len(other) + 1) :]
            case _:
                mutable[at:at] = mutable[at : at + chance.choice((1, 8, 64))]
    return bytes(mutable[:limit])


def _fill(entropy, drawn, field, depth):
    if not field.is_repeated:
        _set(entropy, drawn, field, depth)
        return
    value_field = field.message_type.fields_by_name["value"] if _is_map(field) else field
    for _ in range(entropy.below(4)):
        if _is_map(field):
            _put(entropy, getattr(drawn, field.name), field.message_type.fields_by_name["key"], value_field, depth)
        elif field.message_type is not None:
            getattr(drawn, field.name).add().CopyFrom(_nested(entropy, field, depth))
        else:
            getattr(drawn, field.name).append(_scalar(entropy, field))


def _set(entropy, drawn, field, depth):
    if field.message_type is None:
        setattr(drawn, field.name, _scalar(entropy, field))
    else:
        getattr(drawn, field.name).CopyFrom(_nested(entropy, field, depth))


def _put(entropy, entries, key_field, value_field, depth):
    key = _scalar(entropy, key_field)
    if value_field.message_type is None:
        entries[key] = _scalar(entropy, value_field)
    else:
        entries[key].CopyFrom(_nested(entropy, value_field, depth))


def _nested(entropy, field, depth):
    if depth >= MAX_DEPTH:
        return GetMessageClass(field.message_type)()
    return message(entropy, field.message_type, depth + 1)


def _scalar(entropy, field):
    kind = field.cpp_type
    if kind in KINDS:
        low, bits = KINDS[kind]
        return entropy.pick((low, 1, 2, 3, 7, 1000, 2**bits - 1, int.from_bytes(entropy.take(bits // 8), "little")))
    if kind == F.CPPTYPE_ENUM:
        return entropy.pick((0, 1, 2, 3, 4, 5, 99, 2**31 - 1, -1))
    if kind == F.CPPTYPE_BOOL:
        return entropy.chance(50)
    if kind == F.CPPTYPE_FLOAT:
        return entropy.pick(NASTY_FLOATS)
    if kind == F.CPPTYPE_DOUBLE:
        return entropy.pick(NASTY_DOUBLES)
    if field.type == F.TYPE_BYTES:
        return entropy.take(entropy.pick((0, 1, 16, 32, 33, 64)))
    return entropy.pick(NASTY_TEXT)


def _is_map(field):
    return field.message_type is not None and field.message_type.GetOptions().map_entry
