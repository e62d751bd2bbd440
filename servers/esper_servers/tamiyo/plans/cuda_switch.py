from __future__ import annotations

from collections.abc import Callable

import structlog
import torch

from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.telemetry.events import tell_event
from esper_rpc.telemetry.metrics import PLAN_FALLBACKS
from esper_servers.policy import cuda_device, cuda_plan
from esper_servers.policy.cuda_device import MEGABYTE, VramBudget
from esper_servers.policy.cuda_plan import CudaPlan
from esper_servers.policy.graph import GraphInputs
from esper_servers.policy.network import Heads
from esper_servers.policy.policy import CUDA, Policy
from esper_servers.tamiyo.risk.events import SOURCE

from .plan_check import check_heads

log = structlog.get_logger(__name__)


class CudaSwitch:
    """Serves policies on a CUDA device where one is wanted, and says once why it does not. The CPU serves then."""

    def __init__(
        self,
        device: str,
        vram_mb: int,
        *,
        find: Callable[[str], torch.device | None] = cuda_device.find_device,
        budget_on: Callable[[torch.device, int], VramBudget] = VramBudget.on,
    ) -> None:
        """`device` is as in `[plan]`."""
        self._wanted = device
        self._limit = vram_mb * MEGABYTE
        self._find = find
        self._budget_on = budget_on
        self._budget: VramBudget | None = None
        self.problem = ""
        """Why none is used although one is wanted."""

    def give(self, policy: Policy) -> None:
        """Have a policy computed on the device from its next step on; takes a second at first, so not on the loop."""
        if self.problem or policy.plan == CUDA:
            return
        try:
            device = self._find(self._wanted)
            if device is not None:
                policy.serve_on_device(self._load(policy, device))
                log.info("plan_on_device", device=policy.device_use.name if policy.device_use else "")
        except (ConfigError, RuntimeError) as error:
            self.problem = str(error)
            PLAN_FALLBACKS.inc()
            level = TelemetryLevel.TELEMETRY_LEVEL_WARNING
            tell_event(SOURCE, "plan_fallback", level, reason=self.problem, plan=policy.plan)

    def _load(self, policy: Policy, device: torch.device) -> CudaPlan:
        budget = self._budget = self._budget or self._take_budget(device)
        cuda_device.allow_tf32()
        plan = CudaPlan(policy.network, device, budget=budget)

        def compute(inputs: GraphInputs) -> Heads | None:
            plan.prepare(inputs)
            return plan(inputs)

        check_heads(policy, compute, CUDA, cuda_plan.TOLERANCE)
        budget.check_peak()
        return plan

    def _take_budget(self, device: torch.device) -> VramBudget:
        """Once: what others take of the device later is not for a policy that comes then to answer for."""
        budget = self._budget_on(device, self._limit)
        budget.check_room()
        return budget
