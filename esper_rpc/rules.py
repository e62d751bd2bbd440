"""Field rules of the contract (rules.proto), compiled once per message type."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from .errors import InvalidRequest, Violation
from .proto.leyline.v1 import FieldRules, rules_pb2

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

Test = Callable[[Any], str | None]
Checker = Callable[[Message, str, list[Violation]], None]


def check(message: Message) -> None:
    """Raise InvalidRequest naming every field that breaks a rule."""
    found = violations(message)
    if found:
        raise InvalidRequest("; ".join(f"{v.field}: {v.description}" for v in found[:8]), violations=tuple(found[:64]))


def violations(message: Message) -> list[Violation]:
    """List the fields that break a rule."""
    found: list[Violation] = []
    for checker in _checkers(message.DESCRIPTOR):
        checker(message, "", found)
    return found


@functools.cache
def _checkers(descriptor: Descriptor) -> tuple[Checker, ...]:
    return tuple(checker for field in descriptor.fields for checker in _field_checkers(field))


@functools.cache
def _has_rules(descriptor: Descriptor) -> bool:
    return _reaches_rules(descriptor, frozenset())


def _reaches_rules(descriptor: Descriptor, seen: frozenset[str]) -> bool:
    if descriptor.full_name in seen:
        return False
    seen |= {descriptor.full_name}
    return any(
        field.GetOptions().HasExtension(rules_pb2.rules)
        or (field.message_type is not None and _reaches_rules(field.message_type, seen))
        for field in descriptor.fields
    )


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _value_type(field: FieldDescriptor) -> Descriptor | None:
    """The message that a field holds, in a map the one of its values."""
    entry = field.message_type
    return entry.fields_by_name["value"].message_type if entry is not None and _is_map(field) else entry


def _field_checkers(field: FieldDescriptor) -> Iterable[Checker]:
    rules = field.GetOptions().Extensions[rules_pb2.rules]
    tests = tuple(_value_tests(rules, field))
    if field.is_repeated:
        yield from _collection_checkers(field, rules, tests)
    elif rules.required or tests:
        yield _singular_checker(field, rules, tests)
    nested = _value_type(field)
    if nested is not None and _has_rules(nested):
        yield _nested_checker(field, nested)


def _singular_checker(field: FieldDescriptor, rules: FieldRules, tests: tuple[Test, ...]) -> Checker:
    name, required, has_presence = field.name, rules.required, field.has_presence

    def checker(message: Message, prefix: str, found: list[Violation]) -> None:
        value = getattr(message, name)
        if not (message.HasField(name) if has_presence else value):
            if required:
                found.append(Violation(prefix + name, "is required"))
            return
        found.extend(Violation(prefix + name, text) for test in tests if (text := test(value)))

    return checker


def _collection_checkers(field: FieldDescriptor, rules: FieldRules, tests: tuple[Test, ...]) -> Iterable[Checker]:
    name, is_map = field.name, _is_map(field)
    least = max(rules.min_items, 1 if rules.required else 0)
    most = rules.max_items if rules.HasField("max_items") else None
    if least or most is not None:
        yield _size_checker(name, least, most)
    if tests:

        def checker(message: Message, prefix: str, found: list[Violation]) -> None:
            values = getattr(message, name)
            pairs = values.items() if is_map else enumerate(values)
            for key, value in pairs:
                found.extend(Violation(f"{prefix}{name}[{key}]", text) for test in tests if (text := test(value)))

        yield checker


def _size_checker(name: str, least: int, most: int | None) -> Checker:
    def checker(message: Message, prefix: str, found: list[Violation]) -> None:
        count = len(getattr(message, name))
        if count < least:
            found.append(Violation(prefix + name, f"must have at least {least} items"))
        if most is not None and count > most:
            found.append(Violation(prefix + name, f"must have at most {most} items, has {count}"))

    return checker


def _nested_checker(field: FieldDescriptor, nested: Descriptor) -> Checker:
    name, is_map = field.name, _is_map(field)

    def single(message: Message, prefix: str, found: list[Violation]) -> None:
        if message.HasField(name):
            value = getattr(message, name)
            for checker in _checkers(nested):
                checker(value, f"{prefix}{name}.", found)

    def many(message: Message, prefix: str, found: list[Violation]) -> None:
        checkers, values = _checkers(nested), getattr(message, name)
        for key, value in values.items() if is_map else enumerate(values):
            path = f"{prefix}{name}[{key}]."
            for checker in checkers:
                checker(value, path, found)

    return many if field.is_repeated else single


def _value_tests(rules: Any, field: FieldDescriptor) -> Iterable[Test]:
    for attribute, word, compare in _BOUNDS:
        if rules.HasField(attribute):
            yield _bound_test(getattr(rules, attribute), word, compare)
    for attribute, word, fits in _LENGTHS:
        if rules.HasField(attribute):
            yield _length_test(getattr(rules, attribute), word, fits)
    if rules.finite:
        yield lambda value: None if math.isfinite(value) else "must be finite"
    if rules.uuid:
        yield lambda value: None if _UUID.fullmatch(value) else "must be a UUID"
    if rules.enum_defined:
        yield _enum_test(field.enum_type)
    if rules.HasField("pattern"):
        pattern = re.compile(rules.pattern)
        yield lambda value: None if pattern.fullmatch(value) else f"must match {pattern.pattern}"


# Written so that NaN fails: the value must compare true, not fail to compare false.
_BOUNDS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("gte", "at least", lambda value, bound: value >= bound),
    ("lte", "at most", lambda value, bound: value <= bound),
    ("gt", "more than", lambda value, bound: value > bound),
    ("lt", "less than", lambda value, bound: value < bound),
)
_LENGTHS: tuple[tuple[str, str, Callable[[int, int], bool]], ...] = (
    ("min_len", "at least", lambda length, bound: length >= bound),
    ("max_len", "at most", lambda length, bound: length <= bound),
    ("len", "exactly", lambda length, bound: length == bound),
)


def _enum_test(enum: Any) -> Test:
    defined, name = frozenset(enum.values_by_number), enum.name
    return lambda value: None if value in defined else f"{value} is not a value of {name}"


def _bound_test(bound: float, word: str, compare: Callable[[float, float], bool]) -> Test:
    return lambda value: None if compare(value, bound) else f"must be {word} {bound:g}, is {value:g}"


def _length_test(bound: int, word: str, fits: Callable[[int, int], bool]) -> Test:
    return lambda value: None if fits(len(value), bound) else f"must have {word} {bound} characters or bytes"
