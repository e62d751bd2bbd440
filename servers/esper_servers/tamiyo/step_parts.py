from __future__ import annotations

import asyncio

from esper_rpc.journal import Journal
from esper_rpc.server import MeshServer
from esper_rpc.telemetry.metrics import tell_device, tell_queues
from esper_servers.policy.policy import Policy

from .blueprint_cache import BlueprintCache
from .breakers import JOURNAL as JOURNAL_BREAKER
from .breakers import URZA, Breakers
from .conservative_mode import ConservativeMode
from .field_reports.report_journal import KEPT
from .giving_way import giving_way
from .pipeline import StepPipeline
from .plans.plan_switch import PlanSwitch
from .records.decisions import DecisionLog
from .records.step_dumps import StepDumps
from .run_state import Runs
from .server_config import TamiyoServerConfig

JOURNAL = "journal.sqlite"
RENEWAL_SECONDS = 0.25
DUMP_SECONDS = 0.25
RECORD_SECONDS = 0.25
DEVICE_SECONDS = 1.0


class StepParts:
    """What every process needs that answers steps. The journal is one file, which all of them write."""

    def __init__(self, config: TamiyoServerConfig, mode: ConservativeMode, breakers: Breakers, runs: Runs) -> None:
        """Wire them; raises ConfigError for a state directory that cannot be used."""
        self.journal_file = config.state_dir / JOURNAL
        self.journal = Journal(self.journal_file, kept=KEPT, breaker=breakers[JOURNAL_BREAKER])
        self.decisions = DecisionLog(self.journal)
        self.blueprints = BlueprintCache(breakers[URZA])
        policy = Policy.initial(prior_config=config.prior)
        self.plans = PlanSwitch(policy, config.state_dir / "plans", config.plan)
        self.pipeline = StepPipeline(
            policy=policy,
            runs=runs,
            blueprints=self.blueprints,
            keyring=config.keyring,
            decisions=self.decisions,
            mode=mode,
            breakers=breakers,
            risk_config=config.risk,
            batch=config.batch,
            anticipation=config.anticipation,
            blending=config.blending,
        )
        self.dumps = StepDumps.of(self.pipeline.recorder, self.journal, clock_ns=self.pipeline.clock_ns)

    def work_beside(self, server: MeshServer) -> None:
        """Have the server do what is to be done again and again."""
        server.every(RENEWAL_SECONDS, self.pipeline.renew_graphs)
        server.every(RENEWAL_SECONDS, self.prepare_missed)
        server.every(DEVICE_SECONDS, self.tell_device)
        server.every(DUMP_SECONDS, self.dumps.catch_up)
        server.every(RECORD_SECONDS, self.decisions.hand_over)

    async def tell_queues(self) -> None:
        """Show how many steps and records wait; to be called again and again."""
        tell_queues({"steps": len(self.pipeline.queue), "journal": self.journal.queued})

    async def prepare_missed(self) -> None:
        """Prepare a graph that a device was asked about before it was there; the CPU answers meanwhile."""
        policy = self.pipeline.policy
        if (inputs := policy.missed) is not None:
            with giving_way():
                await asyncio.to_thread(policy.prepare, inputs)

    async def tell_device(self) -> None:
        """Show what is taken of the device that serves, if one does."""
        use = self.pipeline.policy.device_use
        if use is not None:
            parts = {name.removesuffix("_us"): value for name, value in use.times._asdict().items()}
            tell_device(use.peak_bytes, use.budget_bytes, parts)

    async def close(self) -> None:
        """Write down what is left."""
        await self.dumps.close()
        self.journal.close()
