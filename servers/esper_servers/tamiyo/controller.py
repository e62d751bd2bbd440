from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from esper_rpc.envelope import Keyring
from esper_rpc.journal import Journal
from esper_rpc.server import MeshServer, ServerConfig
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig

from .aside import Aside
from .blueprint_cache import BlueprintCache
from .breakers import FIELD_REPORTS, STATE_FILES, URZA, Breakers
from .breakers import JOURNAL as JOURNAL_BREAKER
from .conservative_mode import ConservativeMode
from .field_reports.config import ReportConfig
from .field_reports.publisher import ReportPublisher
from .field_reports.report_journal import KEPT
from .field_reports.reports import FieldReports
from .lasting_state import LastingState
from .pauses.pauses import Pauses
from .pauses.quota import PauseConfig
from .pipeline import StepPipeline
from .plan_switch import PlanConfig, PlanSwitch
from .policy_updates.assembly import updates_of
from .records.decisions import DecisionLog
from .records.replay import Sources, replay_from
from .records.step_dumps import StepDumps
from .risk.config import RiskConfig
from .service import TamiyoServicer
from .step_queue import BatchConfig

JOURNAL = "journal.sqlite"
REPLAY_SECONDS = 60.0
REPORT_SECONDS = 0.25
PRUNE_SECONDS = 60.0
DUMP_SECONDS = 0.25
GAUGE_SECONDS = 1.0
RENEWAL_SECONDS = 0.25
SAVE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TamiyoServerConfig:
    """What the process needs."""

    identity_dir: Path
    state_dir: Path
    keyring: Keyring
    server: ServerConfig = field(default_factory=ServerConfig)
    weatherlight_address: str | None = None
    """Who renews the certificate."""
    urza_address: str | None = None
    risk: RiskConfig = field(default_factory=RiskConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    pause: PauseConfig = field(default_factory=PauseConfig)
    reports: ReportConfig = field(default_factory=ReportConfig)
    publisher: ReportPublisher | None = None
    """Who gets field reports; without one they wait to be listed and acknowledged."""


class Controller:
    """The parts of Tamiyo, and what they do beside the steps."""

    def __init__(self, config: TamiyoServerConfig) -> None:
        """Wire them; raises ConfigError for a state directory that cannot be used."""
        self._config = config
        self._journal_file = config.state_dir / JOURNAL
        mode = ConservativeMode()
        breakers = Breakers(mode)
        self._journal = Journal(self._journal_file, kept=KEPT, breaker=breakers[JOURNAL_BREAKER])
        self._decisions = DecisionLog(self._journal)
        self._lasting = LastingState(config.state_dir, breaker=breakers[STATE_FILES])
        self._aside = Aside()
        self._pauses = Pauses.of(self._journal, config.pause)
        self.blueprints = BlueprintCache(breakers[URZA])
        policy = Policy.initial(prior_config=config.prior)
        self.plans = PlanSwitch(policy, config.state_dir / "plans", config.plan)
        self.pipeline = StepPipeline(
            policy=policy,
            runs=self._lasting.runs,
            blueprints=self.blueprints,
            keyring=config.keyring,
            decisions=self._decisions,
            mode=mode,
            breakers=breakers,
            risk_config=config.risk,
            batch=config.batch,
        )
        self._updates = updates_of(
            self.pipeline,
            directory=config.state_dir / "policies",
            journal=self._journal_file,
            keyring=config.keyring,
            prior=config.prior,
            plans=self.plans,
            aside=self._aside,
            registries=self._lasting.registries.policy_digests,
        )
        self._reports = FieldReports.of(
            self.pipeline.observations,
            self._journal,
            config.reports,
            clock_ns=self.pipeline.clock_ns,
            publisher=config.publisher,
            breaker=breakers[FIELD_REPORTS],
        )
        self._dumps = StepDumps.of(self.pipeline.recorder, self._journal, clock_ns=self.pipeline.clock_ns)
        self.servicer = TamiyoServicer(
            pipeline=self.pipeline,
            blueprints=self.blueprints,
            decisions=self._decisions,
            mode=mode,
            pauses=self._pauses,
            updates=self._updates,
            replay=self._replay,
            reports=self._reports,
            dumps=self._dumps,
        )

    def resume(self) -> Policy:
        """Take up plan and policy of the last start, before the first step; returns the policy."""
        self.plans.prepare()
        self._updates.resume()
        return self.pipeline.policy

    def work_beside(self, server: MeshServer) -> None:
        """Have the server do what is to be done again and again."""
        server.every(GAUGE_SECONDS, self._pauses.tell_remaining)
        server.every(GAUGE_SECONDS, self.pipeline.tell_restraint)
        server.every(RENEWAL_SECONDS, self.pipeline.renew_graphs)
        server.every(SAVE_SECONDS, self._lasting.save)
        server.every(REPORT_SECONDS, self._reports.catch_up)
        server.every(REPORT_SECONDS, self._reports.publish_due)
        server.every(PRUNE_SECONDS, self._reports.prune)
        server.every(DUMP_SECONDS, self._dumps.catch_up)

    async def close(self) -> None:
        """Write down what is left, and end what runs beside."""
        self._aside.close()
        self.pipeline.report()
        await self._reports.catch_up()
        await self._lasting.save()
        await self._dumps.close()
        self._journal.close()

    async def _replay(self, key: str) -> list[str]:
        await asyncio.to_thread(self._decisions.flush)
        sources = Sources(
            journal=self._journal_file,
            policy=self._updates.live_file,
            prior=self._config.prior,
            package=self.plans.served,
        )
        return await self._aside.run(REPLAY_SECONDS, replay_from, sources, key)
