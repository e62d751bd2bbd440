"""Fills variables and directives into the messages of a case.

`${name}` stands for a variable: `unique` (a name nobody used before), `uuid`, or what an earlier call captured. A
mapping with one key that begins with `$` is a directive: $sign, $raw, $repeat, $base64, $sha256, $size, $csr, $token.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from esper_rpc.envelope import Keyring
from esper_rpc.identity import Identity, SpiffeId
from esper_rpc.identity.signing_request import new_signing_request

from .case import CaseError, NotApplicable
from .signing import signed

_VARIABLE = re.compile(r"\$\{([a-z_][a-z0-9_]*)\}")
_STEP = re.compile(r"([a-z0-9_]+)|\[(-?\d+)\]|\[([a-z_]+)=([A-Za-z0-9_]+)\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What cases may use besides the server itself."""

    identity: Callable[[SpiffeId], Identity]
    """Raises NotApplicable for a member whose certificate is not to be had."""
    keyring: Callable[[str], Keyring]
    """The keyring of a role; raises NotApplicable."""
    token: Callable[[SpiffeId], str]
    """Makes an enrolment token; raises NotApplicable."""


class Template:
    """Expands the messages of one case."""

    def __init__(self, surroundings: Surroundings, variables: dict[str, Any]) -> None:
        self._surroundings = surroundings
        self.variables = variables
        self._directives: dict[str, Callable[[Any], Any]] = {
            "$sign": lambda argument: signed(argument, self._surroundings.keyring),
            "$raw": bytes.fromhex,
            "$repeat": lambda argument: argument["value"] * argument["times"],
            "$base64": lambda text: base64.b64encode(text.encode()).decode(),
            "$sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
            "$size": lambda text: len(text.encode()),
            "$csr": lambda _: new_signing_request()[1].decode(),
            "$token": lambda argument: self._surroundings.token(SpiffeId(argument["role"], argument["instance"])),
        }

    def expand(self, value: Any) -> Any:
        """Fill in a value; raises CaseError for what is not known."""
        if isinstance(value, list):
            return [self.expand(item) for item in value]
        if isinstance(value, dict):
            return self._expand_mapping(value)
        if isinstance(value, str):
            return self._expand_text(value)
        return value

    def expand_expectation(self, value: Any) -> Any:
        """Fill in variables and value directives, and leave the matchers alone."""
        if isinstance(value, dict) and len(value) == 1:
            ((key, argument),) = value.items()
            if key in self._directives:
                return self._directives[key](self.expand(argument))
        if isinstance(value, dict):
            return {key: self.expand_expectation(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.expand_expectation(item) for item in value]
        return self._expand_text(value) if isinstance(value, str) else value

    def _expand_mapping(self, value: Mapping[str, Any]) -> Any:
        name = next(iter(value), "")
        if len(value) != 1 or not str(name).startswith("$"):
            return {key: self.expand(item) for key, item in value.items()}
        if name not in self._directives:
            raise CaseError(f"There is no directive {name!r}; choose from {', '.join(self._directives)}.")
        argument = self.expand(value[name])
        try:
            return self._directives[name](argument)
        except (KeyError, TypeError, ValueError, json_format.ParseError) as error:
            raise CaseError(f"{name} cannot use {argument!r}: {error!r}.") from error

    def _expand_text(self, text: str) -> Any:
        whole = _VARIABLE.fullmatch(text)
        return self._variable(whole[1]) if whole else _VARIABLE.sub(lambda found: str(self._variable(found[1])), text)

    def _variable(self, name: str) -> Any:
        if name not in self.variables:
            raise CaseError(f"There is no variable {name!r}; there are {', '.join(self.variables)}.")
        return self.variables[name]


def serialise(method: MethodDescriptor, message: Any) -> bytes:
    """Turn an expanded message into bytes; raises CaseError when it is none of the method's request."""
    if isinstance(message, bytes):
        return message
    request = GetMessageClass(method.input_type)()
    try:
        json_format.ParseDict(message, request)
    except json_format.ParseError as error:
        raise CaseError(f"The request is not a {method.input_type.full_name}: {error}.") from error
    return request.SerializeToString()


def find(document: Any, path: str) -> Any:
    """Follow a path such as `response.seeds[stage=SEED_LIFECYCLE_STAGE_DORMANT].seed_id`; raises NotApplicable."""
    position = 0
    while position < len(path):
        step = _STEP.match(path, position)
        if step is None:
            raise CaseError(f"{path!r} is not a path.")
        try:
            document = _follow(document, step)
        except (KeyError, IndexError, StopIteration, TypeError):
            raise NotApplicable(f"the server has no {path}") from None
        position = step.end() + (path[step.end() : step.end() + 1] == ".")
    return document


def _follow(document: Any, step: re.Match[str]) -> Any:
    name, index, key, value = step.groups()
    if name:
        return document[name]
    return document[int(index)] if index else next(item for item in document if item[key] == value)
