"""Fields of a message as the bytes that protobuf reads, where what is the same at every decision is written once.

A message is its fields one after the other, in any order, and a field that is a message is its length and its bytes.
What changes stands at the end of each field here, so that all that comes before it can be kept.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Mapping

_KEPT = 4096
_KEY, _VALUE = 1, 2
_double = struct.Struct("<d").pack


def write_field(number: int, body: bytes) -> bytes:
    """Write a field of text, bytes or a message; its number is below 16."""
    return bytes((number << 3 | 2,)) + _varint(len(body)) + body


def write_double(number: int, value: float) -> bytes:
    """Write a double; its number is below 16."""
    return bytes((number << 3 | 1,)) + _double(value)


def write_entry(number: int, key: str, value: bytes) -> bytes:
    """Write an entry of a map to messages or text."""
    return write_field(number, write_field(_KEY, key.encode()) + write_field(_VALUE, value))


def write_numbers(number: int, numbers: Iterable[tuple[str, float]]) -> bytes:
    """Write a map to doubles."""
    return b"".join([_before_number(number, key) + _double(value) for key, value in numbers])


def write_texts(number: int, texts: Mapping[str, str]) -> bytes:
    """Write a map to text."""
    return b"".join([write_entry(number, key, text.encode()) for key, text in texts.items()])


@functools.lru_cache(_KEPT)
def _before_number(number: int, key: str) -> bytes:
    value = write_double(_VALUE, 0.0)
    entry = write_field(number, write_field(_KEY, key.encode()) + value)
    return entry[: -len(_double(0.0))]


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
