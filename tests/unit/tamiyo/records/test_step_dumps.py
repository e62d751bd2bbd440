"""An event of priority HIGH or CRITICAL has the steps before it written down, once, in parts and within bounds."""

from __future__ import annotations

import asyncio

import pytest
import structlog

from esper_rpc.errors import FailedPrecondition, InvalidRequest, NotFound
from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandType, SeedOperation, SignedEnvelope, SystemStatePacket
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import TelemetryLevel as Level
from esper_rpc.proto.tamiyo.v1 import (
    EvaluateEpochRequest,
    EvaluateStepsRequest,
    EvaluateStepsResponse,
    NoAction,
    Step,
    StepDecision,
    StepDump,
    StepLedger,
)
from esper_rpc.telemetry.events import tell_event
from esper_rpc.testing import FakeClock
from esper_servers.tamiyo.records.decisions import DecisionRecords
from esper_servers.tamiyo.records.dump_journal import DUMP, MOST_DUMPS, STEP, WRITTEN, DumpJournal
from esper_servers.tamiyo.records.flight_recorder import AnsweredStep, FlightRecorder
from esper_servers.tamiyo.records.step_dumps import LEAST_SECONDS, PART_BYTES, PART_STEPS, StepDumps
from esper_servers.tamiyo.reporting import STEPS_PER_SAMPLE

CALM = {"loss": 0.6, "gradient_norm": 0.9, "samples_per_s": 4000.0, "hook_latency_ms": 1.5}


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    yield journal
    journal.close()


class Rig:
    """Dumps of a recorder that is filled by hand."""

    def __init__(self, journal, recorder=None):
        self.clock = FakeClock()
        self.recorder = recorder or FlightRecorder()
        self.dumps = StepDumps(self.recorder, DumpJournal(journal), clock=self.clock, clock_ns=lambda: 7_000_000_000)
        self.records = DecisionRecords(journal)

    def take_steps(self, first, last, *, run_id="run", decision=None, packet=None):
        for sequence in range(first, last + 1):
            usual = SystemStatePacket(global_step=1000 + sequence, training_metrics={"loss": 0.5})
            step = Step(run_id=run_id, sequence=sequence, budget_us=5000, packet=packet or usual)
            self.note(step, EvaluateStepsRequest(step=step), decision or no_action())

    def note(self, step, request, decision, *, is_epoch=False):
        reply = EvaluateStepsResponse(decision=decision).SerializeToString()
        self.recorder.note(
            step.run_id, step.sequence, request.SerializeToString(), reply, "policy-1", 5_000_000_000, is_epoch
        )

    def catch_up(self):
        asyncio.run(self.dumps.catch_up())

    def listed(self):
        return asyncio.run(self.dumps.page(100, ""))[0]

    def steps(self, dump, size=1000):
        """Read a dump page by page; returns the pages."""
        pages, token = [], ""
        while True:
            page, token = asyncio.run(self.dumps.steps(dump.dump_id, size, token))
            pages.append(page)
            if not token:
                return pages

    def sequences(self, dump):
        return [step.sequence for page in self.steps(dump) for step in page]


@pytest.fixture
def rig(journal):
    rig = Rig(journal)
    yield rig
    rig.dumps.stop_listening()


def no_action():
    return StepDecision(no_action=NoAction(reason="nominal"), ledger=StepLedger(total_us=1234))


def alarm(level=Level.TELEMETRY_LEVEL_ERROR, *, source="tamiyo", name="loss_spike", **details):
    return tell_event(source, name, level, reason="because", **details)


@pytest.mark.parametrize("level", [Level.TELEMETRY_LEVEL_ERROR, Level.TELEMETRY_LEVEL_CRITICAL])
def test_an_urgent_event_has_the_steps_written_down(rig, level):
    rig.take_steps(1, 3)
    packet = alarm(level, run_id="run")
    rig.catch_up()
    (dump,) = rig.listed()
    assert (dump.event, dump.reason, dump.level, dump.run_id) == ("loss_spike", "because", level, "run")
    assert (dump.triggered_at, dump.dumped_at.seconds) == (packet.timestamp, 7)
    assert (dump.events, dump.steps, dump.written) == (1, 3, 3)
    assert rig.sequences(dump) == [1, 2, 3]


@pytest.mark.parametrize(
    ("level", "source"), [(Level.TELEMETRY_LEVEL_WARNING, "tamiyo"), (Level.TELEMETRY_LEVEL_CRITICAL, "kasmina")]
)
def test_an_event_that_is_not_urgent_or_not_of_tamiyo_has_not(rig, level, source):
    rig.take_steps(1, 3)
    alarm(level, source=source)
    rig.catch_up()
    assert rig.listed() == []


def test_without_a_step_there_is_no_dump_and_the_next_event_need_not_wait(rig):
    alarm()
    rig.catch_up()
    rig.take_steps(1, 1)
    rig.catch_up()
    assert rig.listed() == []
    alarm()
    rig.catch_up()
    assert [dump.written for dump in rig.listed()] == [1]


def test_events_of_a_minute_share_a_dump_at_its_end_of_what_is_new(rig):
    rig.take_steps(1, 3)
    alarm()
    rig.catch_up()
    rig.take_steps(4, 5)
    alarm(name="second")
    alarm(name="third")
    rig.clock.advance(LEAST_SECONDS - 1)
    rig.take_steps(6, 6)
    rig.catch_up()
    assert [dump.event for dump in rig.listed()] == ["loss_spike"]
    rig.clock.advance(1)
    first, second = rig.listed()  # To ask is enough.
    assert (second.event, second.events) == ("second", 2)
    assert (rig.sequences(first), rig.sequences(second)) == ([1, 2, 3], [4, 5, 6])
    rig.clock.advance(LEAST_SECONDS)
    assert len(rig.listed()) == 2


def test_a_storm_of_events_costs_one_dump_a_minute(rig):
    for minute in range(3):
        rig.take_steps(10 * minute + 1, 10 * minute + 10)
        for _ in range(1000):
            alarm()
        for _ in range(50):
            rig.catch_up()
        rig.clock.advance(LEAST_SECONDS)
    assert [(dump.events, dump.steps) for dump in rig.listed()] == [(1000, 10)] * 3


def test_what_fell_out_of_the_recorder_is_not_waited_for(journal):
    rig = Rig(journal, FlightRecorder(most_steps=4))
    rig.take_steps(1, 2)
    alarm()
    rig.catch_up()
    rig.take_steps(3, 9)
    alarm()
    rig.clock.advance(LEAST_SECONDS)
    assert [(dump.steps, rig.sequences(dump)) for dump in rig.listed()] == [(2, [1, 2]), (4, [6, 7, 8, 9])]
    rig.dumps.stop_listening()


@pytest.fixture
def parts(journal, monkeypatch):
    """How many steps were written at once."""
    found, add = [], DumpJournal.add

    def counted(self, dump, steps, *, written):
        found.append(len(steps))
        return add(self, dump, steps, written=written)

    monkeypatch.setattr(DumpJournal, "add", counted)
    return found


def test_it_is_written_in_small_parts(rig, parts):
    rig.take_steps(1, 2 * PART_STEPS + 1)
    alarm()
    rig.catch_up()
    assert parts == [PART_STEPS, PART_STEPS, 1]
    assert rig.sequences(*rig.listed()) == list(range(1, 2 * PART_STEPS + 2))


def test_parts_of_large_packets_have_fewer_steps(rig, parts):
    large = SystemStatePacket(training_metrics={"x" * (PART_BYTES // 2): 1.0})
    rig.take_steps(1, 5, packet=large)
    alarm()
    rig.catch_up()
    assert parts == [2, 2, 1]


def test_a_dump_is_read_page_by_page_and_ends_where_the_next_begins(rig):
    for first in (1, 6):
        rig.take_steps(first, first + 4)
        alarm()
        rig.clock.advance(LEAST_SECONDS)
        rig.catch_up()
    first, second = rig.listed()
    assert [[step.sequence for step in page] for page in rig.steps(first, 2)] == [[1, 2], [3, 4], [5]]
    assert [[step.sequence for step in page] for page in rig.steps(second, 5)] == [[6, 7, 8, 9, 10]]
    page, token = asyncio.run(rig.dumps.page(1, ""))
    assert [*page, *asyncio.run(rig.dumps.page(1, token))[0]] == [first, second]


def test_dumps_that_two_processes_write_at_once_are_told_apart(journal):
    dumps = DumpJournal(journal)
    heads = [StepDump(dump_id=name, steps=96) for name in ("one", "other")]
    for part in range(3):
        for head in heads:
            steps = [
                AnsweredStep(head.dump_id, sequence, b"", b"", "policy-1", 0, False)
                for sequence in range(32 * part + 1, 32 * part + 33)
            ]
            assert dumps.add(head, steps, written=32 * part)
    for head in heads:
        found, token = [], ""
        while not found or token:
            page, token = dumps.steps(head.dump_id, 40, token)
            found += page
        assert [(step.run_id, step.sequence) for step in found] == [(head.dump_id, n) for n in range(1, 97)]


def test_an_unknown_dump_and_a_token_of_another_list_are_refused(rig):
    with pytest.raises(NotFound):
        asyncio.run(rig.dumps.steps("unknown", 1, ""))
    with pytest.raises(InvalidRequest):
        asyncio.run(rig.dumps.page(1, "bm90aGluZw=="))


def command_decision(*, operation=SeedOperation.SEED_OPERATION_UNSPECIFIED):
    command = AdaptationCommand(
        command_id="c", command_type=CommandType.COMMAND_TYPE_SEED, annotations={"reason": "policy"}
    )
    command.seed_operation.operation = operation
    return StepDecision(command=SignedEnvelope(payload=command.SerializeToString()), ledger=StepLedger(total_us=9))


def test_a_step_is_told_with_its_answer(rig):
    rig.take_steps(1, 1)
    rig.take_steps(2, 2, decision=command_decision(operation=SeedOperation.SEED_OPERATION_CULL))
    packet = SystemStatePacket(global_step=1003)
    epoch = EvaluateEpochRequest(run_id="run", sequence=3, packet=packet)
    rig.note(epoch, epoch, no_action(), is_epoch=True)
    alarm()
    (page,) = rig.steps(*rig.listed())
    told = [(s.sequence, s.global_step, s.budget_us, s.command_id, s.reason, s.ledger.total_us) for s in page]
    assert told == [
        (1, 1001, 5000, "", "nominal", 1234),
        (2, 1002, 5000, "c", "policy", 9),
        (3, 1003, 0, "", "nominal", 1234),
    ]
    assert [step.command_type for step in page] == [0, CommandType.COMMAND_TYPE_SEED, 0]
    assert [step.operation for step in page] == [0, SeedOperation.SEED_OPERATION_CULL, 0]
    assert {(step.run_id, step.policy_version, step.answered_at.seconds) for step in page} == {("run", "policy-1", 5)}


def test_only_the_newest_dumps_are_kept_and_nothing_is_left_of_the_others(rig, journal):
    for number in range(1, MOST_DUMPS + 4):
        rig.take_steps(number, number)
        alarm()
        rig.clock.advance(LEAST_SECONDS)
        rig.catch_up()
    journal.flush()
    assert [rig.sequences(dump) for dump in rig.listed()] == [[number] for number in range(4, MOST_DUMPS + 4)]
    assert [journal.count(kind) for kind in (DUMP, STEP, WRITTEN)] == [MOST_DUMPS] * 3


def test_a_run_that_began_anew_may_use_its_numbers_again(rig, journal):
    for loss in (0.25, 0.5):
        rig.take_steps(1, 2, packet=SystemStatePacket(training_metrics={"loss": loss}))
        alarm()
        rig.clock.advance(LEAST_SECONDS)
        rig.catch_up()
    assert [rig.sequences(dump) for dump in rig.listed()] == [[1, 2], [1, 2]]
    assert rig.records.explain("run/1").packet.training_metrics["loss"] == 0.5


def test_what_waits_for_its_minute_is_written_at_the_end_of_the_service(rig):
    for last in (2, 3):
        rig.take_steps(last, last)
        alarm()
        rig.catch_up()
    asyncio.run(rig.dumps.close())
    assert [rig.sequences(dump) for dump in rig.listed()] == [[2], [3]]
    rig.take_steps(4, 4)
    alarm()
    rig.clock.advance(LEAST_SECONDS)
    assert len(rig.listed()) == 2


class Refusing(DumpJournal):
    """A disk that takes only the first parts."""

    takes = 1

    def add(self, dump, steps, *, written):
        self.takes -= 1
        return self.takes >= 0 and super().add(dump, steps, written=written)


def test_what_the_disk_did_not_take_is_in_the_next_dump(journal):
    rig = Rig(journal)
    rig.dumps._journal = refusing = Refusing(journal)
    rig.take_steps(1, 2 * PART_STEPS)
    alarm()
    with structlog.testing.capture_logs() as logs:
        rig.catch_up()
    (warning,) = logs
    assert (warning["event"], warning["log_level"], warning["written"]) == ("step_dump_failed", "warning", PART_STEPS)
    (partial,) = rig.listed()
    assert (partial.steps, partial.written) == (2 * PART_STEPS, PART_STEPS)
    refusing.takes = 100
    rig.take_steps(2 * PART_STEPS + 1, 2 * PART_STEPS + 3)
    alarm(name="later")
    rig.clock.advance(LEAST_SECONDS)
    _, rest = rig.listed()
    assert (rest.event, rest.events, rest.steps, rest.written) == ("loss_spike", 2, PART_STEPS + 3, PART_STEPS + 3)
    assert rig.sequences(rest) == list(range(PART_STEPS + 1, 2 * PART_STEPS + 4))
    rig.dumps.stop_listening()


def test_a_caller_that_gives_up_does_not_end_a_dump_in_the_middle(rig, parts):
    rig.take_steps(1, 2 * PART_STEPS)
    alarm()

    async def give_up():
        asking = asyncio.create_task(rig.dumps.catch_up())
        while not parts:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        return await rig.dumps.page(100, "")

    (dump,), _ = asyncio.run(give_up())
    assert dump.written == 2 * PART_STEPS


@pytest.fixture
def controller_dumps(controller):
    dumps = StepDumps(controller.pipeline.recorder, DumpJournal(controller.journal), clock=FakeClock())
    yield dumps
    dumps.stop_listening()


def test_a_step_without_a_record_is_explained_from_a_dump(controller, controller_dumps):
    controller.step(1, **CALM)
    controller.step(2, **(CALM | {"loss": float("nan")}))
    asyncio.run(controller_dumps.catch_up())
    record = controller.decisions.explain("run/1")
    assert record.packet.training_metrics["gradient_norm"] == pytest.approx(0.9)
    assert (record.policy_version, record.HasField("command"), record.HasField("evidence")) == (
        controller.policy.version, False, False,
    )  # fmt: skip
    assert record.reason
    assert record.ledger.total_us > 0
    ((dump,), _) = asyncio.run(controller_dumps.page(1, ""))
    assert record.dump_id == dump.dump_id
    with pytest.raises(FailedPrecondition, match="request and reply") as caught:
        controller.replay.differences("run/1")
    assert caught.value.reason == "NOT_REPLAYABLE"


def test_a_step_with_a_record_is_explained_by_it_also_when_it_was_dumped(controller, controller_dumps):
    controller.train(STEPS_PER_SAMPLE)
    command_id = controller.step(STEPS_PER_SAMPLE + 1, **(CALM | {"loss": float("nan")}))
    asyncio.run(controller_dumps.catch_up())
    for key in (f"run/{STEPS_PER_SAMPLE}", f"run/{STEPS_PER_SAMPLE + 1}"):
        record = controller.decisions.explain(key)
        assert (record.HasField("evidence"), record.dump_id) == (True, "")
    assert record.command.command_id == command_id


def test_a_command_whose_record_was_lost_is_told_from_the_dump(controller, controller_dumps):
    packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED, **(CALM | {"loss": float("nan")}))
    command_id = controller.answer(1, packet)
    controller.pipeline._unrecorded.clear()
    controller.pipeline.report()
    asyncio.run(controller_dumps.catch_up())
    record = controller.decisions.explain("run/1")
    assert (record.command.command_id, record.reason) == (command_id, "loss_not_finite")
    assert record.dump_id
