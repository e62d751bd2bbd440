from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from esper_rpc.errors import FailedPrecondition, NotFound, PermissionDenied
from esper_rpc.proto.leyline.v1 import CommandOutcome, SeedState, SystemStatePacket
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import OpenRunRequest
from esper_servers.policy.graph import MAX_SEEDS, BlueprintCandidate, RunGraph
from esper_servers.policy.norms import Experience, Moments, Norms
from esper_servers.policy.norms_store import NormsStore
from esper_servers.policy.prior import RunSignals
from esper_servers.policy.registries import Registries

from .awaited_outcomes import AwaitedOutcomes
from .command_rest import CommandRest, Marks
from .conservative_mode import ConservativeMode
from .risk.config import RiskConfig
from .risk.history import RiskHistory
from .risk.step_signals import StepSignals
from .turns.anticipation import Rhythm

NEVER = 10**9
LIVE = frozenset({
    Stage.SEED_LIFECYCLE_STAGE_GERMINATED, Stage.SEED_LIFECYCLE_STAGE_TRAINING, Stage.SEED_LIFECYCLE_STAGE_BLENDING,
    Stage.SEED_LIFECYCLE_STAGE_SHADOWING, Stage.SEED_LIFECYCLE_STAGE_PROBATIONARY,
})  # fmt: skip
"""Where Kasmina can still hold what a seed grows."""
ATTACHED = LIVE | {Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED}
"""Where what a seed grows is part of the model."""


@dataclass
class RunState:
    """Everything the controller knows of one run."""

    request: OpenRunRequest
    owner: str
    graph: RunGraph
    catalogue_version: int
    protocol_version: int = 1
    risk: RiskHistory = field(default_factory=RiskHistory)
    steps: int = 0
    germinated_at: int = -NEVER
    optimizer_at: int = -NEVER
    paused_at: int = -NEVER
    global_step: int = 0
    last_sequence: int = 0
    last_digest: bytes = b""
    last_reply: bytes = b""
    commands: int = 0
    planted: dict[str, str] = field(init=False)
    """The blueprint that each seed was last given."""
    awaited: AwaitedOutcomes = field(default_factory=AwaitedOutcomes)
    rest: CommandRest = field(default_factory=CommandRest)
    mode: ConservativeMode = field(init=False)
    """Of this run alone: what one trainer sends must not hold back another."""

    def __post_init__(self) -> None:
        self.planted = {seed.seed_id: seed.blueprint_id for seed in self.request.seeds}
        self.attached = dict(self.graph.attached)
        """The blueprint that grows in each seed, by the last packet that told; the graph follows within a moment."""
        self.mode = ConservativeMode(run_id=self.request.run_id)
        self.rhythm = Rhythm()
        self.has_left = False
        """Whether another process holds the run now, or nobody; then this is not what is known of it."""
        self._is_deciding = False
        self._settled: asyncio.Future[None] | None = None
        self._successor: RunGraph | None = None

    def begin_step(self) -> None:
        """Keep the graph until `end_step`."""
        self._is_deciding = True

    def end_step(self) -> None:
        """Let the next step have the graph that came meanwhile."""
        self._is_deciding = False
        if self._successor is not None:
            self.graph, self._successor = self._successor, None
        if self._settled is not None:
            self._settled.set_result(None)
            self._settled = None

    async def until_settled(self) -> None:
        """Wait until no step is being decided; for one that waits only, with nobody to begin another."""
        if self._is_deciding:
            self._settled = asyncio.get_running_loop().create_future()
            await self._settled

    def take_graph(self, graph: RunGraph, catalogue_version: int) -> None:
        """Use another graph from the next step on: what the policy puts out is read with the graph that it saw."""
        self.catalogue_version = catalogue_version
        if self._is_deciding:
            self._successor = graph
        else:
            self.graph = graph

    def has_graph_of(self, catalogue_version: int) -> bool:
        """Whether its graph holds this catalogue, and what grows in its seeds."""
        graph = self._successor or self.graph
        return self.catalogue_version == catalogue_version and self.attached == graph.attached

    @property
    def features(self) -> frozenset[str]:
        """What the run can carry out."""
        return frozenset(self.request.features)

    @property
    def experience(self) -> Experience:
        """What its norms have learned so far."""
        return Experience(self.graph.norms.moments.copy(), self.steps)

    def signals(self) -> RunSignals:
        """Summarise for the prior."""
        return RunSignals(
            steps=self.steps,
            steps_since_germination=self.steps - self.germinated_at,
            loss_trend=self.risk.loss.trend,
            loss_volatility=self.risk.loss.volatility,
            steps_since_optimizer=self.steps - self.optimizer_at,
        )

    @property
    def is_resting(self) -> bool:
        """Whether no command is for it, because the last ones came too late."""
        return self.steps < self.rest.until

    def note_issued(self, command_id: str) -> None:
        """Expect to hear of a command, before anything that it does is noted."""
        self.rest.note_issued(
            command_id, Marks(self.germinated_at, self.optimizer_at, self.paused_at, self.risk.adjusted)
        )

    def hear(self, outcomes: Sequence[CommandOutcome], config: RiskConfig) -> None:
        """Take in what a step tells of the last command: one that came late has not happened."""
        before = self.rest.hear(outcomes, step=self.steps, longest=config.cool_down_steps)
        if before is not None:
            self.germinated_at, self.optimizer_at, self.paused_at, self.risk.adjusted = before

    def observe(self, packet: SystemStatePacket, config: RiskConfig) -> StepSignals:
        """Take in the packet of a step."""
        seeds = packet.seed_states[:MAX_SEEDS]
        for seed in seeds:
            self._note_growth(seed.seed_id, seed.stage)
        return self.risk.observe(packet, seeds, self._grown(seeds), config)

    def ordered_seeds(self, packet: SystemStatePacket) -> Sequence[SeedState]:
        """The packet's seeds in the order of the graph's nodes; an unknown one is ignored, a missing one is blank."""
        by_id = {state.seed_id: state for state in packet.seed_states}
        return [by_id.get(seed_id) or SeedState(seed_id=seed_id) for seed_id in self.graph.seed_ids]

    def _note_growth(self, seed_id: str, stage: Stage.ValueType) -> None:
        planted = self.planted.get(seed_id) if stage in ATTACHED else ""
        if planted:
            self.attached[seed_id] = planted
        else:
            self.attached.pop(seed_id, None)

    def _grown(self, seeds: Sequence[SeedState]) -> list[BlueprintCandidate]:
        planted = {self.planted.get(seed.seed_id, "") for seed in seeds if seed.stage in LIVE}
        return [self.graph.blueprint_of[name] for name in planted if name in self.graph.blueprint_of]


class Runs:
    """Open runs, the least recently used forgotten first. A new one starts from the norms of those before it."""

    def __init__(
        self, capacity: int = 256, *, norms: NormsStore | None = None, registries: Registries | None = None
    ) -> None:
        self._capacity = capacity
        self._norms = norms or NormsStore()
        self._registries = registries or Registries()
        self._runs: OrderedDict[str, RunState] = OrderedDict()
        self.on_forgotten: Callable[[str], None] = lambda _run_id: None
        """Called with each run that is closed, or had to make room."""

    def __len__(self) -> int:
        return len(self._runs)

    def all(self) -> list[RunState]:
        """Every open run."""
        return list(self._runs.values())

    def open(
        self,
        request: OpenRunRequest,
        owner: str,
        blueprints: Sequence[BlueprintCandidate],
        catalogue_version: int,
        protocol_version: int = 1,
        *,
        policy_norms: Moments | None = None,
        graph: RunGraph | None = None,
    ) -> bool:
        """Open or reopen a run; returns whether it is new. Raises PermissionDenied for another's run.

        `policy_norms` are those that the live policy was trained with. `graph` is what `build_graph` makes of the
        request, which takes milliseconds for a large host.
        """
        graph = graph or build_graph(request, blueprints)
        known = self._runs.get(request.run_id)
        if known is not None:
            _check_owner(known, owner)
            if known.request.receiver_epoch == request.receiver_epoch:
                graph.norms = known.graph.norms
                known.request, known.protocol_version = request, protocol_version
                known.take_graph(graph, catalogue_version)
                known.planted |= {seed.seed_id: seed.blueprint_id for seed in request.seeds if seed.blueprint_id}
                self.register(request, blueprints)
                return False
        graph.norms = self._norms.begin(policy_norms)
        if known is not None:
            self._norms.end(known.experience)
        self._runs[request.run_id] = RunState(request, owner, graph, catalogue_version, protocol_version)
        self._runs.move_to_end(request.run_id)
        self.register(request, blueprints)
        while len(self._runs) > self._capacity:
            self._forget(next(iter(self._runs)))
        return known is None

    def holds(self, run_id: str) -> bool:
        """Whether a run is open here."""
        return run_id in self._runs

    def take(self, run_id: str) -> RunState | None:
        """Let go of a run that goes on elsewhere; None when it is not here."""
        run = self._runs.pop(run_id, None)
        if run is not None:
            run.has_left = True
        return run

    def protocol_of(self, owner: str) -> int:
        """The oldest protocol among the runs of an identity: what one stream of it must be able to read."""
        return min((state.protocol_version for state in self._runs.values() if state.owner == owner), default=1)

    def find(self, run_id: str) -> RunState:
        """Return a run, whoever owns it; raises NotFound."""
        state = self._runs.get(run_id)
        if state is None:
            raise NotFound(f"Run {run_id!r} is not open here; call OpenRun first.", reason="RUN_NOT_OPEN")
        return state

    def get(self, run_id: str, owner: str) -> RunState:
        """Return a run of this owner; raises NotFound or PermissionDenied."""
        state = self.find(run_id)
        _check_owner(state, owner)
        self._runs.move_to_end(run_id)
        return state

    def close(self, run_id: str, owner: str) -> bool:
        """Forget a run; returns whether it was known."""
        if run_id not in self._runs:
            return False
        _check_owner(self._runs[run_id], owner)
        self._forget(run_id)
        return True

    def _forget(self, run_id: str) -> None:
        self._norms.end(self._runs.pop(run_id).experience)
        self.on_forgotten(run_id)

    def register(self, request: OpenRunRequest, blueprints: Sequence[BlueprintCandidate]) -> None:
        """Number the names of a run's seeds and blueprints."""
        for seed in request.seeds:
            self._registries.seed.index(seed.seed_id)
        for blueprint in blueprints:
            self._registries.blueprint.index(blueprint.blueprint_id)


def build_graph(
    request: OpenRunRequest,
    blueprints: Sequence[BlueprintCandidate],
    norms: Norms | None = None,
    attached: Mapping[str, str] | None = None,
) -> RunGraph:
    """Build the structure of a run's graph; raises FailedPrecondition for a topology that is not JSON.

    `attached` are the blueprints that grow in seeds; without it those that the request tells.
    """
    try:
        topology = orjson.loads(request.host_topology or b"{}")
    except orjson.JSONDecodeError as error:
        raise FailedPrecondition(f"host_topology is not JSON: {error}.") from error
    if attached is None:
        attached = {s.seed_id: s.blueprint_id for s in request.seeds if s.stage in ATTACHED and s.blueprint_id}
    document = topology if isinstance(topology, dict) else {}
    return RunGraph(document, request.sites, request.seeds, blueprints, norms, attached)


def _check_owner(state: RunState, owner: str) -> None:
    if state.owner != owner:
        raise PermissionDenied("This run was opened by another identity.", reason="NOT_THE_OWNER")
