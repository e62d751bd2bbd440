from __future__ import annotations

import asyncio

from esper_rpc.proto.tamiyo.v1 import OpenRunRequest
from esper_rpc.server import MeshServer
from esper_servers.policy.policy import Policy

from .aside import Aside
from .breakers import FIELD_REPORTS, STATE_FILES, Breakers
from .conservative_mode import ConservativeMode
from .field_reports.reports import FieldReports
from .lasting_state import LastingState
from .pauses.pauses import Pauses
from .policy_updates.assembly import updates_of
from .records.replay import Sources, replay_from
from .server_config import TamiyoServerConfig
from .service import TamiyoServicer
from .step_parts import StepParts
from .step_processes.peers import Admin, StepPeers
from .step_processes.processes import StepProcesses
from .step_processes.run_directory import RunDirectory

REPLAY_SECONDS = 60.0
REPORT_SECONDS = 0.25
PRUNE_SECONDS = 60.0
GAUGE_SECONDS = 1.0
SAVE_SECONDS = 30.0


class Controller:
    """The parts of Tamiyo, and what they do beside the steps."""

    def __init__(self, config: TamiyoServerConfig) -> None:
        """Wire them; raises ConfigError for a state directory that cannot be used."""
        self._config = config
        mode = ConservativeMode()
        breakers = Breakers(mode)
        self._lasting = LastingState(config.state_dir, breaker=breakers[STATE_FILES])
        self._parts = parts = StepParts(config, mode, breakers, self._lasting.runs)
        self.pipeline, self.blueprints = parts.pipeline, parts.blueprints
        self._aside = Aside()
        self._pauses = Pauses.of(parts.journal, config.pause)
        self._others = StepPeers()
        self._updates = updates_of(
            self.pipeline,
            directory=config.state_dir / "policies",
            journal=parts.journal_file,
            keyring=config.keyring,
            prior=config.prior,
            plans=parts.plans,
            aside=self._aside,
            registries=self._lasting.registries.policy_digests,
            on_taken_up=self._others.take_up_policy,
        )
        self._reports = FieldReports.of(
            self.pipeline.observations,
            parts.journal,
            config.reports,
            clock_ns=self.pipeline.clock_ns,
            publisher=config.publisher,
            breaker=breakers[FIELD_REPORTS],
        )
        directory = RunDirectory(self._register)
        self.servicer = TamiyoServicer(
            pipeline=self.pipeline,
            blueprints=self.blueprints,
            decisions=parts.decisions,
            pauses=self._pauses,
            updates=self._updates,
            replay=self._replay,
            reports=self._reports,
            dumps=parts.dumps,
            directory=directory,
            others=self._others,
        )
        admin = Admin(
            directory=directory,
            peers=self._others,
            servicer=self.servicer,
            observations=self.pipeline.observations,
            live_policy=lambda: self._updates.live_file,
            on_inference_lost=self._updates.distrust,
            on_run_ended=self._lasting.norms.end,
        )
        self.step_processes = StepProcesses(config.step_processes, admin)

    def resume(self) -> Policy:
        """Take up plan and policy of the last start, before the first step; returns the policy."""
        self._parts.plans.prepare()
        self._updates.resume()
        return self.pipeline.policy

    async def build_plan(self) -> None:
        """Build the compiled plan if there is none, and have every process serve it."""
        await self._parts.plans.build()
        self._others.take_up_plan()

    def work_beside(self, server: MeshServer) -> None:
        """Have the server do what is to be done again and again."""
        server.every(GAUGE_SECONDS, self._pauses.tell_remaining)
        server.every(GAUGE_SECONDS, self.pipeline.tell_restraint)
        server.every(GAUGE_SECONDS, self._parts.tell_queues)
        server.every(SAVE_SECONDS, self._lasting.save)
        server.every(REPORT_SECONDS, self._reports.catch_up)
        server.every(REPORT_SECONDS, self._reports.publish_due)
        server.every(PRUNE_SECONDS, self._reports.prune)
        self._parts.work_beside(server)

    async def close(self) -> None:
        """Write down what is left, and end what runs beside."""
        await self.step_processes.end()
        self._aside.close()
        self.pipeline.report()
        await self._reports.catch_up()
        await self._lasting.save()
        await self._parts.close()

    async def _replay(self, key: str) -> list[str]:
        await asyncio.to_thread(self._parts.decisions.flush)
        sources = Sources(
            journal=self._parts.journal_file,
            policy=self._updates.live_file,
            prior=self._config.prior,
            package=self._parts.plans.served,
        )
        return await self._aside.run(REPLAY_SECONDS, replay_from, sources, key)

    def _register(self, request: OpenRunRequest) -> None:
        """Number the names of a run that is opened in whichever process."""
        self._lasting.runs.register(request, self.blueprints.candidates(request.sites))
