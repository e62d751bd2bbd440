from __future__ import annotations

import asyncio
import contextlib
import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch

from esper_client.client import UrzaClient
from esper_client.renewal import CHECK_SECONDS, CertificateRenewer
from esper_rpc.envelope import Keyring
from esper_rpc.identity import Identity
from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import tamiyo_service_pb2
from esper_rpc.server import MeshServer, ServerConfig, announce
from esper_servers.policy import sample
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.masks import LEGAL_OPERATIONS
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig, RunSignals

from .aside import Aside
from .blueprint_cache import BlueprintCache
from .conservative_mode import ConservativeMode
from .decisions import DecisionLog
from .lasting_state import LastingState
from .pause_quota import PauseConfig
from .pauses import Pauses
from .pipeline import StepPipeline
from .plan_switch import PlanConfig, PlanSwitch
from .policy_updates.assembly import updates_of
from .risk.config import RiskConfig
from .service import RAW_METHODS, TamiyoServicer

SERVICE = tamiyo_service_pb2.DESCRIPTOR.services_by_name["TamiyoService"]
JOURNAL = "journal.sqlite"
WARM_UP_STEPS = 20
GAUGE_SECONDS = 1.0
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
    pause: PauseConfig = field(default_factory=PauseConfig)


async def serve(config: TamiyoServerConfig) -> None:
    """Serve until SIGTERM or SIGINT; raises ConfigError before anything listens."""
    identity = Identity.load(config.identity_dir)
    keyring = config.keyring
    journal = Journal(config.state_dir / JOURNAL)
    blueprints, mode, decisions = BlueprintCache(), ConservativeMode(), DecisionLog(journal)
    lasting = LastingState(config.state_dir)
    policy = Policy.initial(prior_config=config.prior)
    plans = PlanSwitch(policy, config.state_dir / "plans", config.plan)
    pipeline = StepPipeline(
        policy=policy,
        runs=lasting.runs,
        blueprints=blueprints,
        keyring=keyring,
        decisions=decisions,
        mode=mode,
        risk_config=config.risk,
    )
    pauses, aside = Pauses.of(journal, config.pause), Aside()
    updates = updates_of(
        pipeline,
        directory=config.state_dir / "policies",
        journal=config.state_dir / JOURNAL,
        keyring=keyring,
        prior=config.prior,
        plans=plans,
        aside=aside,
        registries=lasting.registries.policy_digests,
    )
    servicer = TamiyoServicer(
        pipeline=pipeline, blueprints=blueprints, decisions=decisions, mode=mode, pauses=pauses, updates=updates
    )
    server = MeshServer(config=config.server, identity=identity)
    server.add_service(SERVICE, servicer, raw_methods=RAW_METHODS)
    async with contextlib.AsyncExitStack() as stack:
        if config.urza_address:
            urza = await stack.enter_async_context(UrzaClient(config.urza_address, identity=identity))
            await blueprints.refresh(urza)
            refresher = asyncio.create_task(blueprints.keep_fresh(urza))
            stack.callback(refresher.cancel)
        stack.callback(aside.close)
        plans.prepare()
        updates.resume()
        prepare(pipeline.policy)
        announce("tamiyo", await server.start())
        server.every(CHECK_SECONDS, CertificateRenewer(identity, address=config.weatherlight_address).check)
        server.every(CHECK_SECONDS, keyring.refresh)
        building = asyncio.create_task(plans.build())
        stack.callback(building.cancel)
        server.every(GAUGE_SECONDS, pauses.tell_remaining)
        server.every(GAUGE_SECONDS, pipeline.tell_restraint)
        server.every(SAVE_SECONDS, lasting.save)
        await server.run_until_signal()
    pipeline.report()
    await lasting.save()
    journal.close()


def prepare(policy: Policy) -> None:
    """Make the process fit for steps: one thread, warm caches, long-lived objects out of the collector."""
    # Two torch threads are twice as slow as one on graphs of this size.
    torch.set_num_threads(1)
    graph = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), [])
    states = sample.sample_states(next(iter(LEGAL_OPERATIONS)))  # type: ignore[arg-type]  # A stage by number.
    signals = RunSignals(
        steps=0, steps_since_germination=0, loss_trend=0.0, loss_volatility=0.0, steps_since_optimizer=0
    )
    for _ in range(WARM_UP_STEPS):
        policy.evaluate(graph.fill(SystemStatePacket(seed_states=states)), states, signals)
    gc.collect()
    gc.freeze()
