from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from .answer import Answer, Transport, as_dict
from .case import Case, CaseCall, CaseError, Expectation, NotApplicable
from .matching import differences
from .templates import Surroundings, Template, find, serialise


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What came of one case."""

    name: str
    rpc: str
    problems: tuple[str, ...] = ()
    skipped: str = ""
    """Why it could not be run."""

    @property
    def verdict(self) -> str:
        """One word."""
        return "skipped" if self.skipped else "failed" if self.problems else "passed"


def any_name() -> str:
    """Draw a name that no server has seen."""
    return f"contract-{uuid.uuid4().hex[:12]}"


class Runner:
    """Runs cases one after the other through one transport."""

    def __init__(
        self, transport: Transport, surroundings: Surroundings, *, unique: Callable[[], str] = any_name
    ) -> None:
        self._transport = transport
        self._surroundings = surroundings
        self._unique = unique

    async def run(self, case: Case) -> Result:
        """Run one case; raises CaseError when it is written wrongly."""
        template = Template(self._surroundings, {"unique": self._unique(), "uuid": str(uuid.uuid4())})
        rpc = case.call.method.name
        try:
            problems = await self._attempt(case, template)
        except NotApplicable as reason:
            return Result(name=case.name, rpc=rpc, skipped=str(reason))
        except CaseError as error:
            raise CaseError(f"{case.name}: {error.message}") from error
        return Result(name=case.name, rpc=rpc, problems=tuple(problems))

    async def _attempt(self, case: Case, template: Template) -> list[str]:
        try:
            failed = await self._prepare(case.before, template)
            return [failed] if failed else await self._judge(case, template)
        finally:
            for call in case.after:
                await self._call(call, template, None)

    async def _prepare(self, calls: Iterable[CaseCall], template: Template) -> str:
        for call in calls:
            answer = await self._call(call, template, None)
            if answer.error is not None:
                return f"before: {call.method.name} answered {answer.code}: {answer.error.message}"
        return ""

    async def _judge(self, case: Case, template: Template) -> list[str]:
        wanted = len(case.expect.responses) if case.is_success and not case.expect.ends else None
        answer = await self._call(case.call, template, wanted)
        return judge(case.expect, answer, template)

    async def _call(self, call: CaseCall, template: Template, wanted: int | None) -> Answer:
        messages = [serialise(call.method, template.expand(message)) for message in call.messages]
        answer = await self._transport.call(call.method, messages, call.caller, wanted)
        if answer.error is None and call.captures:
            template.variables.update(_captured(call, messages, answer))
        return answer


def judge(expect: Expectation, answer: Answer, template: Template) -> list[str]:
    """Say in what an answer is not what was expected."""
    if answer.code != expect.code:
        told = f": {answer.error.message}" if answer.error is not None else ""
        return [f"the status is {answer.code}{told}, expected {expect.code}"]
    problems = []
    if expect.reason is not None and answer.error is not None and answer.error.reason != expect.reason:
        problems.append(f"the reason is {answer.error.reason}, expected {expect.reason}")
    problems += differences(dict(expect.violations), dict(answer.violations), "violations")
    return problems + _judge_responses(expect, answer, template)


def _judge_responses(expect: Expectation, answer: Answer, template: Template) -> list[str]:
    expected = [template.expand_expectation(response) for response in expect.responses]
    if len(answer.responses) < len(expected):
        return [f"{len(answer.responses)} responses came, expected {len(expected)}"]
    if expect.ends and len(answer.responses) > len(expected):
        return [f"{len(answer.responses)} responses came, expected {len(expected)} and the end"]
    pairs = zip(expected, answer.responses, strict=False)
    return [problem for one, other in pairs for problem in differences(one, other)]


def _captured(call: CaseCall, messages: list[bytes], answer: Answer) -> Mapping[str, Any]:
    sent = GetMessageClass(call.method.input_type).FromString(messages[0])
    document = {"request": as_dict(sent), "response": answer.responses[0] if answer.responses else {}}
    document["responses"] = list(answer.responses)  # type: ignore[assignment]  # All of a stream, beside the first.
    return {name: find(document, path) for name, path in call.captures.items()}
