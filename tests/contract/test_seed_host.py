"""One suite for both seed hosts: beside the loop, and behind KasminaService over mutual TLS."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
import uuid

import pytest
import torch
from torch import nn

from esper_client import LoopThread, RemoteHostConfig, RemoteSeedHost
from esper_rpc.envelope import reasons, sign
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.errors import Unimplemented
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType, SeedOperation, TelemetryLevel
from esper_rpc.proto.urza.v1 import Blueprint
from esper_rpc.testing import serving
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.host_config import SeedHostConfig
from esper_servers.kasmina.kernels.library import Kernel, KernelLibrary
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.service import KasminaServicer
from esper_servers.kasmina.telemetry.rejections import TOLD_EACH
from esper_servers.trainer import wrap_sites

KASMINA = kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]
FACTORIES = load_factories()
SEED, OTHER = "seed-0", "seed-2"
HOUR_NS = 3600 * 10**9
QUEUED, APPLIED, FAILED, REJECTED = (
    CommandOutcome.RESULT_QUEUED, CommandOutcome.RESULT_APPLIED, CommandOutcome.RESULT_FAILED,
    CommandOutcome.RESULT_REJECTED,
)  # fmt: skip
LIFE = [
    ("GERMINATE", lifecycle.GERMINATED, 0), ("START_TRAINING", lifecycle.TRAINING, 1),
    ("START_GRAFTING", lifecycle.BLENDING, 20), ("STABILIZE", lifecycle.SHADOWING, 1),
    ("EVALUATE", lifecycle.PROBATIONARY, 1), ("FOSSILIZE", lifecycle.FOSSILIZED, 1),
]  # fmt: skip


class Case:
    """A model under training and its seed host; `host` is what the loop uses, `inner` what holds the model."""

    def __init__(self, mesh, *, limits=None):
        torch.manual_seed(0)
        self.mesh = mesh
        self.model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        library = KernelLibrary(None, lambda work: work.close())
        library.add(Kernel(Blueprint(descriptor=FACTORIES["residual_mlp"].descriptor(),
                                     manifest=FACTORIES["residual_mlp"].manifest())))  # fmt: skip
        self.identity = mesh.identity("trainer")
        self.inner = self.host = InProcessSeedHost(
            model=self.model, sites=wrap_sites(self.model, ["0", "2"]), keyring=mesh.keyring("trainer"),
            audience=str(self.identity.spiffe_id), library=library, factories=FACTORIES,
            learning_rate=OptimizerAuthority(self.optimizer), config=SeedHostConfig(limits=limits or LocalLimits()),
        )  # fmt: skip
        self.x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
        self.model(self.x)
        self.step_index, self.sequence = 0, 0

    def close(self):
        self.host.close()

    def step(self):
        """Make one training step, as a session makes it; returns all that is known to be settled after it."""
        self.optimizer.zero_grad()
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.step_index += 1
        self.host.observe(float(loss.detach()), self.step_index)
        settled = self.host.apply_pending()
        self.host.advance_alphas()
        self.packets = self.host.finalize_step(self.step_index)
        return settled + self.host.apply_pending()

    def command(self, operation="", seed_id=SEED, command_id=""):
        command = AdaptationCommand(
            version=1, command_id=command_id or str(uuid.uuid4()), target_seed_id=seed_id,
            command_type=CommandType.COMMAND_TYPE_SEED,
        )  # fmt: skip
        if operation:
            command.seed_operation.operation = SeedOperation.Value(f"SEED_OPERATION_{operation}")
            command.seed_operation.blueprint_id = "residual_mlp" if operation == "GERMINATE" else ""
        return command

    def pause(self, seed_id=""):
        command = self.command(seed_id=seed_id)
        command.command_type, command.execution_deadline_ms = CommandType.COMMAND_TYPE_PAUSE, 10_000
        return command

    def scale(self, multiplier):
        command = self.command(seed_id="")
        command.command_type = CommandType.COMMAND_TYPE_OPTIMIZER
        command.optimizer_adjustment.hyperparameters["learning_rate_multiplier"] = multiplier
        return command

    def envelope(self, command, role="tamiyo", **changes):
        self.sequence += 1
        fields = {
            "payload_type": COMMAND_TYPE, "audience": str(self.identity.spiffe_id), "issued_at_ns": time.time_ns(),
            "nonce": command.command_id, "receiver_epoch": self.inner.receiver_epoch, "sequence": self.sequence,
        } | changes  # fmt: skip
        return sign(command.SerializeToString(), keyring=self.mesh.keyring(role), **fields)

    def order(self, command):
        """Submit a command, end the step, and return what became of it."""
        queued = self.host.submit(self.envelope(command))
        assert queued.result == QUEUED, queued
        (outcome,) = self.step()
        assert outcome.command_id == command.command_id
        return outcome

    def live(self, until):
        """Let the seed grow up to a stage; yields its state after every command."""
        for operation, stage, steps in LIFE:
            command_id = str(uuid.uuid5(uuid.NAMESPACE_OID, operation))  # It seeds the weights.
            outcome = self.order(self.command(operation, command_id=command_id))
            assert outcome.result == APPLIED, outcome
            assert self.seed().stage == stage
            if stage == until:
                return
            for _ in range(steps):
                self.step()

    def seed(self, seed_id=SEED):
        return {state.seed_id: state for state in self.host.export_seed_states()}[seed_id]

    def picture(self):
        """All that a refused command must leave as it is."""
        weights = {key: value.tolist() for key, value in self.model.state_dict().items()}
        states = [(s.stage, slot.site.paused, slot.blueprint_id)
                  for s, slot in zip(self.inner.export_seed_states(), self.inner.seeds.values(), strict=True)]  # fmt: skip
        return weights, states, [g["lr"] for g in self.optimizer.param_groups], self.inner.queued_commands


class RemoteCase(Case):
    """The same, with a server between the loop and the host."""

    def __init__(self, mesh, **options):
        super().__init__(mesh, **options)
        self._thread, self._stop = LoopThread("kasmina-server"), None
        started = threading.Event()

        async def run():
            self._stop = asyncio.Event()
            async with serving(self.identity, (KASMINA, KasminaServicer(self.inner, "run"))) as server:
                self._address = server.address
                started.set()
                await self._stop.wait()

        self._running = asyncio.run_coroutine_threadsafe(run(), self._thread.loop)
        assert started.wait(20)
        config = RemoteHostConfig(call_timeout_ms=10_000, describe_timeout_ms=10_000)
        self.host = RemoteSeedHost(self._address, identity=self.identity, config=config)

    def close(self):
        assert not self.host.reasons
        self.host.close()
        self._thread.loop.call_soon_threadsafe(self._stop.set)
        self._running.result(20)
        self._thread.stop()


@pytest.fixture(params=[Case, RemoteCase], ids=["in process", "remote"])
def make_case(request, mesh):
    made = []

    def make(**options):
        made.append(request.param(mesh, **options))
        return made[-1]

    yield make
    for case in made:
        case.close()


@pytest.fixture
def case(make_case):
    return make_case()


def test_it_describes_the_model(case):
    case.live(until=lifecycle.GERMINATED)
    assert case.host.describe() == case.inner.describe()
    assert case.host.receiver_epoch == case.inner.receiver_epoch
    assert case.host.last_sequence == 1


def test_a_seed_lives_from_germination_to_a_fossil(case):
    case.live(until=lifecycle.BLENDING)
    alphas = []
    for _ in range(20):
        alphas.append(case.seed().metrics["alpha"])
        case.step()
    assert alphas == pytest.approx([0.05 * n for n in range(1, 21)])
    assert [packet.packet_id for packet in case.packets] == [f"{SEED}-{case.step_index}", f"global-{case.step_index}"]
    for operation in ("STABILIZE", "EVALUATE", "FOSSILIZE"):
        assert case.order(case.command(operation)).result == APPLIED
        case.step()
    assert case.seed().stage == lifecycle.FOSSILIZED
    assert [g["lr"] for g in case.optimizer.param_groups] == pytest.approx([0.1, 0.01])


def test_both_hosts_grow_the_same_model_bit_for_bit(mesh):
    cases = [Case(mesh), RemoteCase(mesh)]
    for case in cases:
        case.live(until=lifecycle.FOSSILIZED)
        case.step()
    first, second = (case.inner.state_dict()["digests"] for case in cases)
    assert first == second
    assert cases[0].picture() == cases[1].picture()
    for case in cases:
        case.close()


def altered(envelope, **fields):
    for name, value in fields.items():
        setattr(envelope, name, value)
    return envelope


# Each gets a case in which sequence 1 has been used, and a command that would be carried out.
REFUSED = {
    reasons.MISSING_SIGNATURE: lambda case, c: altered(case.envelope(c), mac=b""),
    reasons.INVALID_SIGNATURE: lambda case, c: altered(case.envelope(c), run_id="another"),
    reasons.UNKNOWN_KEY: lambda case, c: altered(case.envelope(c), key_id="another"),
    reasons.WRONG_ISSUER: lambda case, c: case.envelope(c, role="simic"),
    reasons.WRONG_AUDIENCE: lambda case, c: case.envelope(c, audience="spiffe://esper/trainer/another"),
    reasons.WRONG_PAYLOAD_TYPE: lambda case, c: case.envelope(c, payload_type="esper.leyline.v1.PolicyUpdate"),
    reasons.STALE_COMMAND: lambda case, c: case.envelope(c, issued_at_ns=time.time_ns() - HOUR_NS),
    reasons.FUTURE_COMMAND: lambda case, c: case.envelope(c, issued_at_ns=time.time_ns() + HOUR_NS),
    reasons.WRONG_EPOCH: lambda case, c: case.envelope(c, receiver_epoch=bytes(16)),
    reasons.SEQUENCE_REPLAYED: lambda case, c: case.envelope(c, sequence=1),
    reasons.NONCE_REPLAYED: lambda case, c: case.envelope(c, nonce="another"),
    reasons.OVERSIZE: lambda case, c: altered(case.envelope(c), payload=bytes(300_000)),
    reasons.UNSUPPORTED: lambda case, c: case.envelope(
        AdaptationCommand(version=1, command_id=c.command_id, command_type=CommandType.COMMAND_TYPE_ROLLBACK)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refused_command_changes_nothing_and_says_why(case, reason):
    case.order(case.scale(1.0))
    envelope = REFUSED[reason](case, case.command("GERMINATE"))
    before = case.picture()
    outcome = case.host.submit(envelope)
    assert (outcome.result, outcome.reason, outcome.command_id) == (REJECTED, reason, envelope.nonce)
    assert case.picture() == before
    assert case.inner.verifier.rejections == {reason: 1}
    assert case.step() == []
    assert case.seed().stage == lifecycle.DORMANT


def told(packets):
    return [(packet.packet_id, event) for packet in packets for event in packet.events]


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refused_command_is_told_with_the_packets_of_the_step(case, reason):
    case.order(case.scale(1.0))
    assert told(case.packets) == []
    envelope = REFUSED[reason](case, case.command("GERMINATE"))
    case.host.submit(envelope)
    case.step()
    ((packet_id, event),) = told(case.packets)
    assert packet_id == f"global-{case.step_index}"
    assert case.packets[-1].level == event.level == TelemetryLevel.TELEMETRY_LEVEL_WARNING
    assert event.attributes == {
        "reason": reason, "command_id": envelope.nonce, "priority": "HIGH", "step_index": str(case.step_index),
    }  # fmt: skip
    case.step()
    assert told(case.packets) == []


@pytest.mark.parametrize(
    ("operation", "reason"), [("GERMINATE", reasons.LOCAL_LIMIT), ("FOSSILIZE", "illegal_transition")]
)
def test_a_command_that_is_rejected_at_the_end_of_the_step_is_counted_and_told(make_case, operation, reason):
    case = make_case(limits=LocalLimits(live_seeds=0))
    outcome = case.order(case.command(operation))
    ((_, event),) = told(case.packets)
    assert (event.attributes["reason"], event.attributes["command_id"]) == (reason, outcome.command_id)
    assert case.inner.verifier.rejections == {reason: 1}


def test_a_flood_of_forged_envelopes_is_told_in_a_few_events(case):
    for number in range(200):
        case.host.submit(altered(case.envelope(case.command("GERMINATE")), mac=b"" if number % 2 else bytes(32)))
    case.step()
    events = [event for _, event in told(case.packets)]
    counts = {event.attributes["reason"]: int(event.attributes["count"]) for event in events[TOLD_EACH:]}
    assert counts == dict.fromkeys((reasons.MISSING_SIGNATURE, reasons.INVALID_SIGNATURE), 100 - TOLD_EACH // 2)
    assert len({event.event_id for event in events}) == len(events) == TOLD_EACH + 2


def test_a_command_beyond_a_local_limit_changes_nothing(make_case):
    case = make_case(limits=LocalLimits(live_seeds=0))
    outcome = case.order(case.command("GERMINATE"))
    assert (outcome.result, outcome.reason) == (REJECTED, reasons.LOCAL_LIMIT)
    assert case.seed().stage == lifecycle.DORMANT
    assert case.inner.verifier.rejections == {reasons.LOCAL_LIMIT: 1}


def test_every_reason_of_the_contract_has_a_case():
    assert {*REFUSED, reasons.LOCAL_LIMIT} == reasons.ALL


@pytest.mark.parametrize(
    ("sequence", "digest", "result"),
    [(0, b"request", QUEUED), (1, b"request", REJECTED), (0, b"another", REJECTED)],
    ids=["the answer", "to another step", "to another request"],
)
def test_in_a_step_only_the_answer_to_its_request_is_taken(case, sequence, digest, result):
    asked, answered = hashlib.sha256(b"request").digest(), hashlib.sha256(digest).digest()
    envelope = case.envelope(case.scale(0.5), sequence=7 + sequence, request_digest=answered)
    outcome = case.host.submit(envelope, expected_sequence=7, request_digest=asked)
    assert outcome.result == result
    assert outcome.reason == ("" if result == QUEUED else reasons.SEQUENCE_REPLAYED)


def test_the_identical_envelope_is_carried_out_once(case):
    envelope = case.envelope(case.scale(0.5))
    assert [case.host.submit(envelope).result for _ in range(2)] == [QUEUED, QUEUED]
    assert {outcome.result for outcome in case.step()} == {APPLIED}
    assert case.host.submit(envelope).result == APPLIED
    assert case.step() == []
    assert case.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_nothing_changes_before_the_end_of_the_step(case):
    before = case.picture()
    case.host.submit(case.envelope(case.command("GERMINATE")))
    assert case.picture() == (*before[:3], 1)


@pytest.mark.parametrize("operation", ["GERMINATE", "CULL", ""])
def test_an_unknown_seed_fails_the_command(case, operation):
    make = case.command if operation else case.pause
    outcome = case.order(make(*[operation] if operation else [], seed_id="nobody"))
    assert (outcome.result, outcome.reason, outcome.seed_id) == (FAILED, "unknown_seed", "nobody")


def test_an_operation_out_of_order_is_refused(case):
    outcome = case.order(case.command("FOSSILIZE"))
    assert (outcome.result, outcome.reason) == (REJECTED, "illegal_transition")


def test_a_paused_seed_stands_still_while_the_loop_goes_on(case):
    case.live(until=lifecycle.BLENDING)
    assert case.order(case.pause()).result == APPLIED
    before = case.seed().metrics["alpha"]
    case.step()
    assert case.seed().metrics["alpha"] == before
    assert case.inner.seeds[SEED].site.paused


def test_an_optimizer_command_scales_the_learning_rate(case):
    assert case.order(case.scale(0.5)).result == APPLIED
    assert case.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_live_seeds_age_with_the_epochs(case):
    case.live(until=lifecycle.TRAINING)
    case.host.update_epoch(1)
    case.host.update_epoch(2)
    assert (case.seed().age_epochs, case.seed(OTHER).age_epochs) == (2, 0)


def test_freshness_is_judged_by_the_clock_of_the_controller(case):
    case.host.set_clock_offset(time.time_ns() + HOUR_NS - time.monotonic_ns())
    fresh = case.envelope(case.scale(0.5), issued_at_ns=time.time_ns() + HOUR_NS)
    assert case.host.submit(fresh).result == QUEUED
    assert case.host.submit(case.envelope(case.scale(0.5))).reason == reasons.STALE_COMMAND


def test_the_gates_see_the_loss_of_the_loop(case):
    case.live(until=lifecycle.PROBATIONARY)
    case.optimizer.zero_grad()
    case.host.submit(case.envelope(case.command("FOSSILIZE")))
    case.host.observe(1e6, case.step_index + 1)
    first = case.host.apply_pending()
    case.host.finalize_step(case.step_index + 1)
    (outcome,) = first + case.host.apply_pending()
    assert (outcome.result, outcome.reason) == (FAILED, "g4_system_impact")
    assert case.seed().stage in (lifecycle.CULLED, lifecycle.EMBARGOED)


def test_weights_are_kept_where_the_model_is(mesh):
    case = RemoteCase(mesh)
    for method in (case.host.state_dict, case.host.export, lambda: case.host.load_state_dict({})):
        with pytest.raises(Unimplemented, match="in another process"):
            method()
    case.close()
