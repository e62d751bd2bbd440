"""Cases made from the field rules of the descriptors: a request that is well but for one rule of one field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from esper_rpc.proto.leyline.v1 import FieldRules, rules_pb2

UUID = "00000000-0000-4000-8000-000000000000"
UNDEFINED = 10_007
"""An enum value that no type defines."""
MOST_BYTES_SENT = 64 * 1024
"""Larger requests are checked without sending them."""
_FLOATS = frozenset({FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE})
_UNSIGNED = frozenset(
    {
        FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED32,
        FieldDescriptor.TYPE_FIXED64,
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleCase:
    """A request with one broken rule, and how the server must tell it."""

    method: MethodDescriptor
    field: str
    """As BadRequest names it, for example `step.outcomes[0].reason`."""
    rule: str
    request: Message
    told: str
    """What the description of the violation matches."""

    @property
    def name(self) -> str:
        """Name it in a report."""
        return f"{self.method.name} refuses {self.field} that breaks {self.rule}"


@dataclass(frozen=True, slots=True)
class _Place:
    """A field of a request, and the messages on the way to it."""

    path: tuple[FieldDescriptor, ...]

    @property
    def field(self) -> FieldDescriptor:
        return self.path[-1]


def rule_cases(method: MethodDescriptor) -> Iterator[RuleCase]:
    """Break every rule of every field that a request of this method can hold, one at a time."""
    for place in _places(method.input_type, ()):
        rules = place.field.GetOptions().Extensions[rules_pb2.rules]
        for rule, _ in rules.ListFields():
            for break_it, told in _ways_to_break(rule.name, getattr(rules, rule.name), place.field):
                yield _broken(method, place, rule.name, break_it, told)


def sample(method: MethodDescriptor) -> list[RuleCase]:
    """Choose the first case of each rule that is small enough to be sent."""
    chosen: dict[str, RuleCase] = {}
    for case in rule_cases(method):
        size = case.request.ByteSize()
        # A stream takes an empty message as a greeting, not as a question.
        if size <= MOST_BYTES_SENT and (size or not method.client_streaming):
            chosen.setdefault(case.rule, case)
    return list(chosen.values())


def smallest(descriptor: Descriptor) -> Message:
    """Make the smallest message that breaks no rule."""
    message: Message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        rules = field.GetOptions().Extensions[rules_pb2.rules]
        if rules.required or rules.min_items:
            _fill(message, field, max(1, rules.min_items))
    return message


def _places(descriptor: Descriptor, path: tuple[FieldDescriptor, ...]) -> Iterator[_Place]:
    for field in descriptor.fields:
        here = (*path, field)
        yield _Place(here)
        nested = _value_type(field)
        if nested is not None and all(nested is not _value_type(passed) for passed in path):
            yield from _places(nested, here)


def _value_type(field: FieldDescriptor) -> Descriptor | None:
    """The type of a message, of an item or of the values of a map."""
    return _scalar(field).message_type


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _broken(
    method: MethodDescriptor, place: _Place, rule: str, break_it: Callable[[Message], str], told: str
) -> RuleCase:
    request = smallest(method.input_type)
    message, prefix = request, ""
    for field in place.path[:-1]:
        message, name = _enter(message, field)
        prefix += f"{name}."
    return RuleCase(method=method, field=prefix + break_it(message), rule=rule, request=request, told=told)


def _enter(message: Message, field: FieldDescriptor) -> tuple[Any, str]:
    """Step into the first message of a field, which is made if it is missing, and name the step."""
    held = getattr(message, field.name)
    nested = _value_type(field)
    assert nested is not None
    if _is_map(field):
        held["k"].CopyFrom(smallest(nested))
        return held["k"], f"{field.name}[k]"
    if field.is_repeated:
        return (held[0] if held else _added(held, nested)), f"{field.name}[0]"
    if not message.HasField(field.name):
        held.CopyFrom(smallest(nested))
        held.SetInParent()
    return held, field.name


def _added(held: Any, nested: Descriptor) -> Any:
    held.append(smallest(nested))
    return held[0]


def _fill(message: Message, field: FieldDescriptor, count: int) -> None:
    """Set a field to what breaks no rule."""
    if not field.is_repeated:
        _set(message, field, _well(field))
        return
    message.ClearField(field.name)
    held = getattr(message, field.name)
    for index in range(count):
        _add(held, field, f"k{index}", _well(field))


def _set(message: Message, field: FieldDescriptor, value: Any) -> None:
    if field.message_type is None:
        setattr(message, field.name, value)
    else:
        getattr(message, field.name).CopyFrom(value)
        getattr(message, field.name).SetInParent()


def _add(held: Any, field: FieldDescriptor, key: str, value: Any) -> None:
    if not _is_map(field):
        held.append(value)
    elif _value_type(field) is None:
        held[key] = value
    else:
        held[key].CopyFrom(value)


def _scalar(field: FieldDescriptor) -> FieldDescriptor:
    """The field itself, or that of the values of a map."""
    return field.message_type.fields_by_name["value"] if field.message_type is not None and _is_map(field) else field


def _well(field: FieldDescriptor) -> Any:
    """Return a value, of an item or of a map's entry too, that is present and breaks no rule."""
    nested, rules, kind = _value_type(field), field.GetOptions().Extensions[rules_pb2.rules], _scalar(field)
    if nested is not None:
        return smallest(nested)
    if kind.enum_type is not None:
        return next(number for number in kind.enum_type.values_by_number if number)
    if kind.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        text = UUID if rules.uuid else "a" * max(1, rules.min_len, rules.len)
        return text if kind.type == FieldDescriptor.TYPE_STRING else text.encode()
    return True if kind.type == FieldDescriptor.TYPE_BOOL else _well_number(rules)


def _well_number(rules: FieldRules) -> int:
    for candidate in (1, rules.gte, rules.gt + 1, rules.lte, rules.lt - 1):
        if _is_within(rules, candidate):
            return int(candidate)
    raise ValueError(f"no value is within {rules}")


def _is_within(rules: FieldRules, value: float) -> bool:
    return (
        (not rules.HasField("gte") or value >= rules.gte)
        and (not rules.HasField("lte") or value <= rules.lte)
        and (not rules.HasField("gt") or value > rules.gt)
        and (not rules.HasField("lt") or value < rules.lt)
    )


Break = Callable[[Message], str]
"""Breaks a rule of a field of this message and returns how the field is named."""


def _ways_to_break(rule: str, bound: Any, field: FieldDescriptor) -> Iterator[tuple[Break, str]]:
    if rule == "required":
        told = "^must have at least 1 items$" if field.is_repeated else "^is required$"
        yield partial(_clear, field=field), told
    elif rule in ("min_items", "max_items"):
        count, word = (bound - 1, "least") if rule == "min_items" else (bound + 1, "most")
        yield partial(_resize, field=field, count=count), f"^must have at {word} {bound} items"
    else:
        for value, told in _wrong_values(rule, bound, field):
            yield partial(_put, field=field, value=value), told


def _clear(message: Message, field: FieldDescriptor) -> str:
    message.ClearField(field.name)
    return field.name


def _resize(message: Message, field: FieldDescriptor, count: int) -> str:
    _fill(message, field, count)
    return field.name


def _put(message: Message, field: FieldDescriptor, value: Any) -> str:
    """Set a field, or its only item, to a wrong value."""
    if not field.is_repeated:
        setattr(message, field.name, value)
        return field.name
    message.ClearField(field.name)
    held = getattr(message, field.name)
    _add(held, field, "k", value)
    return f"{field.name}[k]" if _is_map(field) else f"{field.name}[0]"


def _wrong_values(rule: str, bound: Any, field: FieldDescriptor) -> Iterator[tuple[Any, str]]:
    if rule in _WORDS:
        yield from _out_of_bounds(rule, bound, _scalar(field).type)
    elif rule in ("min_len", "max_len", "len"):
        unit = "a" if _scalar(field).type == FieldDescriptor.TYPE_STRING else b"a"
        yield unit * (bound - 1 if rule == "min_len" else bound + 1), f"{bound} characters or bytes$"
    elif rule == "finite":
        yield from ((value, "^must be finite$") for value in (math.nan, math.inf, -math.inf))
    elif rule == "uuid":
        yield from ((text, "^must be a UUID$") for text in (UUID[1:], UUID.replace("-", ""), f"{UUID}\n"))
    elif rule == "enum_defined":
        yield UNDEFINED, f"^{UNDEFINED} is not a value of "
    elif rule == "pattern":
        yield _mismatch(bound), "^must match "
    else:
        raise ValueError(f"There is no way to break the rule {rule!r}; write one here.")


_WORDS = {"gte": "at least", "lte": "at most", "gt": "more than", "lt": "less than"}


def _out_of_bounds(rule: str, bound: float, kind: int) -> Iterator[tuple[Any, str]]:
    told = f"^must be {_WORDS[rule]} {re.escape(f'{bound:g}')}, is "
    step = {"gte": -1, "gt": 0, "lte": 1, "lt": 0}[rule]
    if kind in _FLOATS:
        yield from ((value, told) for value in (bound + step, math.nan))
    elif kind not in _UNSIGNED or bound + step >= 0:
        yield int(bound) + step, told


def _mismatch(pattern: str) -> str:
    candidates = ("", "a", "A", "0", "-", " ", "\n", "é")
    return next(text for text in candidates[1:] if not re.fullmatch(pattern, text))
