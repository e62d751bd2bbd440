from __future__ import annotations

from functools import partial
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from esper_rpc.server import Call
from esper_servers.tamiyo.pipeline import StepPipeline
from esper_servers.tamiyo.step_service import StepServicer

from .held_runs import HeldRuns
from .link import Link


class ForwardingServicer(StepServicer):
    """Answers steps here, and has everything else answered by the admin process."""

    def __init__(self, pipeline: StepPipeline, runs: HeldRuns, service: ServiceDescriptor, link: Link) -> None:
        super().__init__(pipeline, runs)
        self._link = link
        for method in service.methods:
            if not hasattr(self, method.name):
                setattr(self, method.name, partial(self._forward, method.name))

    async def _forward(self, method: str, request: Any, call: Call) -> Any:
        """The caller was authorised here, and the request checked."""
        return await self._link.call("forward", method, request, (call.method, str(call.peer)))
