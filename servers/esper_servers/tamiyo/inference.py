from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from esper_rpc.proto.leyline.v1 import SeedState
from esper_servers.policy.graph import GraphInputs
from esper_servers.policy.policy import Policy, PolicyOutput
from esper_servers.policy.prior import RunSignals

from .giving_way import giving_way
from .step_queue import StepQueue


class Inference:
    """Runs the policy for the step whose turn it is: on the loop's thread, or beside it.

    While turns are long the loop is kept free, so that others are taken in or refused at once. Short ones are not worth
    it: a hop to another thread and back, and passing the interpreter around, cost as much as they do. Only compiled
    code can run beside: the eager plan would fight the loop for the interpreter at each of its operations.
    """

    def __init__(self, queue: StepQueue) -> None:
        self._queue = queue
        # Torch counts threads by the thread that calls, and two are slower than one.
        self._thread = ThreadPoolExecutor(1, "inference", initializer=functools.partial(torch.set_num_threads, 1))

    async def run(
        self, policy: Policy, inputs: GraphInputs, seeds: Sequence[SeedState], signals: RunSignals
    ) -> PolicyOutput:
        """Evaluate the policy; raises what it raises.

        A caller that goes away meanwhile is told so at its next wait: a decision that was begun is finished, for
        whoever asks the same again.
        """
        if not (self._queue.has_long_turns and policy.can_run_beside(inputs)):
            return policy.evaluate(inputs, seeds, signals)
        evaluate = functools.partial(policy.evaluate, inputs, seeds, signals, beside=True)
        self._queue.note_beside()
        with giving_way():
            return await _finished(asyncio.get_running_loop().run_in_executor(self._thread, evaluate))


async def _finished(future: asyncio.Future[PolicyOutput]) -> PolicyOutput:
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        task.cancel()
        return future.result()
