from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
import torch

from esper_servers.policy.policy import Asked, Policy, PolicyOutput
from esper_servers.tamiyo.giving_way import giving_way

from .company import Company
from .finishing import finished
from .step_queue import StepQueue
from .stopwatch import Stopwatch

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one step asks of a policy."""

    policy: Policy
    asked: Asked
    watch: Stopwatch


Evaluations = Company[Evaluation, PolicyOutput]


class Inference:
    """Runs the policy for the step whose turn it is: on the loop's thread, or beside it; for several at once.

    While turns are long the loop is kept free, so that others are taken in or refused at once. Short ones are not worth
    it: a hop to another thread and back, and passing the interpreter around, cost as much as they do. Only compiled
    code can run beside: the eager plan would fight the loop for the interpreter at each of its operations.
    """

    def __init__(self, queue: StepQueue) -> None:
        self._queue = queue
        # Torch counts threads by the thread that calls, and two are slower than one.
        self._thread = ThreadPoolExecutor(1, "inference", initializer=functools.partial(torch.set_num_threads, 1))

    async def run(
        self, policy: Policy, asked: Asked, watch: Stopwatch, company: Evaluations | None = None
    ) -> PolicyOutput:
        """Evaluate the policy, with those who share the turn; raises what it raises for this one.

        A caller that goes away meanwhile is told so at its next wait: a decision that was begun is finished, for
        whoever asks the same again.
        """
        if company is not None:
            return await self._run_together(Evaluation(policy, asked, watch), company)
        if not (self._queue.has_long_turns and policy.can_run_beside(asked.inputs)):
            return policy.evaluate(*asked)
        evaluate = functools.partial(policy.evaluate, *asked, beside=True)
        self._queue.note_beside()
        with giving_way():
            return await finished(asyncio.get_running_loop().run_in_executor(self._thread, evaluate))

    async def _run_together(self, evaluation: Evaluation, company: Evaluations) -> PolicyOutput:
        output = await company.ask(evaluation, evaluate_all)
        evaluation.watch.lap("batch_wait_us")  # Behind the evaluation others go on before this one does.
        return output


def evaluate_all(evaluations: Sequence[Evaluation]) -> list[PolicyOutput | Exception]:
    """Answer each, those of one policy in one pass; an exception stands for an answer that there is none to."""
    answers: dict[int, PolicyOutput | Exception] = {}
    for evaluation in evaluations:
        evaluation.watch.lap("batch_wait_us")
    for policy in dict.fromkeys(evaluation.policy for evaluation in evaluations):
        members = [n for n, evaluation in enumerate(evaluations) if evaluation.policy is policy]
        answers.update(zip(members, _evaluate_many(policy, [evaluations[n].asked for n in members]), strict=True))
    for evaluation in evaluations:
        evaluation.watch.lap("inference_us")
    return [answers[n] for n in range(len(evaluations))]


def _evaluate_many(policy: Policy, asked: Sequence[Asked]) -> list[PolicyOutput | Exception]:
    """In one pass; one by one what comes out of it unusable, so that each answers only for itself."""
    try:
        found: Sequence[PolicyOutput | None] = policy.evaluate_many(asked)
    except Exception as error:  # noqa: BLE001  # Whatever a policy does, each step gets an answer of its own.
        log.error("batch_failed", size=len(asked), error=repr(error)[:200], priority="HIGH")
        found = [None] * len(asked)
    return [
        output if output is not None and output.is_finite else _evaluate_one(policy, each)
        for output, each in zip(found, asked, strict=True)
    ]


def _evaluate_one(policy: Policy, asked: Asked) -> PolicyOutput | Exception:
    try:
        return policy.evaluate(*asked)
    except Exception as error:  # noqa: BLE001  # As above.
        return error
