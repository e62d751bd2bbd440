"""Partial matches: an expectation names what must be there, and says nothing about the rest.

A mapping matches when every key it names matches, a list item by item. `$any` matches whatever is there, `$non_empty`
what is not empty, {$regex: ...} a text, {$some: ...} a list with such an item, {$absent: [...]} a message without these
fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from .case import CaseError


def differences(expected: Any, found: Any, path: str = "response") -> list[str]:
    """Say where the found value does not match; empty when it does."""
    return list(_differences(expected, found, path))


def _differences(expected: Any, found: Any, path: str) -> Iterator[str]:
    if isinstance(expected, str) and expected in _WORDS:
        if not _WORDS[expected](found):
            yield f"{path} is {found!r}, expected {expected.removeprefix('$')}"
    elif isinstance(expected, dict):
        yield from _mapping(expected, found, path)
    elif isinstance(expected, list):
        yield from _list(expected, found, path)
    elif not _equal(expected, found):
        yield f"{path} is {found!r}, expected {expected!r}"


def _mapping(expected: dict[str, Any], found: Any, path: str) -> Iterator[str]:
    matchers = {key: value for key, value in expected.items() if key.startswith("$")}
    for name, argument in matchers.items():
        yield from _matcher(name, path)(argument, found, path)
    if not matchers or len(matchers) < len(expected):
        yield from _message({key: value for key, value in expected.items() if key not in matchers}, found, path)


def _message(expected: dict[str, Any], found: Any, path: str) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{path} is {found!r}, expected a message"
        return
    for key, value in expected.items():
        if key in found:
            yield from _differences(value, found[key], f"{path}.{key}")
        else:
            yield f"{path}.{key} is not set"


def _list(expected: list[Any], found: Any, path: str) -> Iterator[str]:
    if not isinstance(found, list) or len(found) != len(expected):
        yield f"{path} is {found!r}, expected {len(expected)} items"
        return
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        yield from _differences(one, other, f"{path}[{index}]")


def _equal(expected: Any, found: Any) -> bool:
    # Protobuf JSON writes 64-bit integers as strings.
    if isinstance(found, str) and isinstance(expected, int) and not isinstance(expected, bool):
        return str(expected) == found
    return bool(expected == found) and isinstance(expected, bool) == isinstance(found, bool)


def _regex(pattern: str, found: Any, path: str) -> Iterator[str]:
    if not isinstance(found, str) or not re.search(pattern, found):
        yield f"{path} is {found!r}, expected to match {pattern}"


def _some(expected: Any, found: Any, path: str) -> Iterator[str]:
    if not isinstance(found, list) or all(differences(expected, item, path) for item in found):
        yield f"{path} is {found!r}, expected an item like {expected!r}"


def _absent(keys: list[str], found: Any, path: str) -> Iterator[str]:
    for key in keys:
        if isinstance(found, dict) and key in found:
            yield f"{path}.{key} is {found[key]!r}, expected it not to be set"


def _matcher(name: str, path: str) -> Callable[[Any, Any, str], Iterator[str]]:
    if name not in _MATCHERS:
        raise CaseError(f"{path}: there is no matcher {name!r}; choose from {', '.join([*_WORDS, *_MATCHERS])}.")
    return _MATCHERS[name]


_WORDS: dict[str, Callable[[Any], bool]] = {
    "$any": lambda _: True,
    "$non_empty": lambda found: bool(found) and found != "0",
}
_MATCHERS: dict[str, Callable[[Any, Any, str], Iterator[str]]] = {
    "$regex": _regex,
    "$some": _some,
    "$absent": _absent,
}
