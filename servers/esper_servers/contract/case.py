from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml
from google.protobuf.descriptor import MethodDescriptor

from esper_rpc.errors import ConfigError, InvalidRequest
from esper_rpc.identity import SpiffeId

from .methods import METHODS, SERVICES

CASES = Path(__file__).parent / "cases"
CODES = frozenset(code.name for code in grpc.StatusCode)
_INSTANCE = "local"


class CaseError(ConfigError):
    """A case is written wrongly; the message says which, where, and what is allowed."""


class NotApplicable(Exception):  # It names a circumstance, not a fault.
    """What a case needs is not to be had here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseCall:
    """One call, its messages still with variables and directives."""

    method: MethodDescriptor
    caller: SpiffeId
    messages: tuple[Any, ...]
    captures: Mapping[str, str] = field(default_factory=dict)
    """Variable by path, for example `seed: response.seeds[0].seed_id`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """What the answer must be."""

    code: str = "OK"
    reason: str | None = None
    violations: Mapping[str, Any] = field(default_factory=dict)
    """By field, how the rule is told, or a matcher."""
    responses: tuple[Any, ...] = ()
    """Partial matches, the first responses of a stream."""
    ends: bool = False
    """Whether the stream ends after those."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A call, what must be done before and after, and what it must answer."""

    name: str
    call: CaseCall
    expect: Expectation
    before: tuple[CaseCall, ...] = ()
    after: tuple[CaseCall, ...] = ()
    """Made whatever happened, to leave the server as it was."""

    @property
    def service(self) -> str:
        """The full name of the service."""
        return self.call.method.containing_service.full_name

    @property
    def is_success(self) -> bool:
        """Whether the call is to succeed."""
        return self.expect.code == "OK"


def load_cases(directory: Path = CASES) -> list[Case]:
    """Read every file of a directory; raises CaseError."""
    cases = [case for path in sorted(directory.glob("*.yaml")) for case in load_file(path)]
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CaseError(f"{directory}: two cases have the name {twice[0]!r}.")
    return cases


def load_file(path: Path) -> list[Case]:
    """Read the cases of one service; raises CaseError."""
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise CaseError(f"{path.name} is not valid YAML: {error}") from error
    top = _Reader(document, path.name, {"service", "cases"})
    service = top.text("service")
    if service not in SERVICES:
        raise CaseError(f"{path.name}: there is no service {service!r}; choose from {', '.join(SERVICES)}.")
    return [_case(entry, f"{path.name}: case {number}", service) for number, entry in enumerate(top.list("cases"), 1)]


class _Reader:
    """A mapping of which only known keys are accepted."""

    def __init__(self, value: Any, where: str, allowed: set[str]) -> None:
        if not isinstance(value, dict):
            raise CaseError(f"{where}: expected a mapping, found {type(value).__name__}.")
        unknown = sorted(map(str, set(value) - allowed))
        if unknown:
            raise CaseError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(allowed))}.")
        self.value = value
        self.where = where

    def text(self, key: str, default: str | None = None) -> str:
        found = self.value.get(key, default)
        if not isinstance(found, str):
            raise CaseError(f"{self.where}: {key!r} must be a string.")
        return found

    def list(self, key: str) -> Sequence[Any]:
        found = self.value.get(key, [])
        if not isinstance(found, list):
            raise CaseError(f"{self.where}: {key!r} must be a list.")
        return found

    def mapping(self, key: str) -> dict[str, Any]:
        found = self.value.get(key, {})
        if not isinstance(found, dict):
            raise CaseError(f"{self.where}: {key!r} must be a mapping.")
        return found

    def texts(self, key: str) -> dict[str, str]:
        found = self.mapping(key)
        if not all(isinstance(v, str) for v in found.values()):
            raise CaseError(f"{self.where}: {key!r} must map names to strings.")
        return found

    def only_one_of(self, one: str, other: str) -> None:
        if one in self.value and other in self.value:
            raise CaseError(f"{self.where}: {one!r} and {other!r} exclude each other.")


_CALL_KEYS = {"rpc", "caller", "request", "requests", "captures"}


def _case(entry: Any, where: str, service: str) -> Case:
    reader = _Reader(entry, where, {"name", "before", "after", "expect", *_CALL_KEYS})
    name = reader.text("name")
    reader.where = f"{where} ({name})"
    return Case(
        name=name,
        call=_call(reader, service),
        expect=_expectation(entry.get("expect", {}), f"{reader.where}, expect"),
        before=tuple(_steps(reader, "before", service)),
        after=tuple(_steps(reader, "after", service)),
    )


def _steps(reader: _Reader, key: str, service: str) -> Iterator[CaseCall]:
    for number, entry in enumerate(reader.list(key), 1):
        yield _call(_Reader(entry, f"{reader.where}, {key} {number}", _CALL_KEYS), service)


def _call(reader: _Reader, service: str) -> CaseCall:
    reader.only_one_of("request", "requests")
    method = METHODS.get(f"{service}/{reader.text('rpc')}")
    if method is None:
        known = ", ".join(m.name for m in SERVICES[service].methods)
        raise CaseError(f"{reader.where}: {service} has no RPC {reader.text('rpc')!r}; it has {known}.")
    if method.client_streaming != ("requests" in reader.value):
        needed = "'requests', a list" if method.client_streaming else "'request'"
        raise CaseError(f"{reader.where}: {method.name} takes {needed}.")
    messages = reader.list("requests") if method.client_streaming else [reader.value.get("request", {})]
    return CaseCall(method=method, caller=_caller(reader), messages=tuple(messages), captures=reader.texts("captures"))


def _caller(reader: _Reader) -> SpiffeId:
    role, _, instance = reader.text("caller").partition("/")
    try:
        return SpiffeId(role, instance or _INSTANCE)
    except InvalidRequest:
        raise CaseError(f"{reader.where}: 'caller' must be <role> or <role>/<instance>.") from None


def _expectation(entry: Any, where: str) -> Expectation:
    reader = _Reader(entry, where, {"code", "reason", "violations", "response", "responses", "ends"})
    reader.only_one_of("response", "responses")
    code = reader.text("code", "OK")
    if code not in CODES:
        raise CaseError(f"{where}: {code!r} is not a status code; choose from {', '.join(sorted(CODES))}.")
    responses = [entry["response"]] if "response" in entry else reader.list("responses")
    return Expectation(
        code=code,
        reason=reader.text("reason") if "reason" in entry else None,
        violations=reader.mapping("violations"),
        responses=tuple(responses),
        ends=bool(entry.get("ends", False)),
    )
