from __future__ import annotations

import math
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from esper_rpc.proto.leyline.v1 import CommandOutcome, FieldReportOutcome
from esper_servers.tamiyo.field_reports.config import ReportConfig
from esper_servers.tamiyo.field_reports.observations import Observations

ABORTED, NEUTRAL, REGRESSION, SUCCESS = (
    FieldReportOutcome.Value(f"FIELD_REPORT_OUTCOME_{name}") for name in ("ABORTED", "NEUTRAL", "REGRESSION", "SUCCESS")
)
OTHER_HOST = bytes(range(16))


async def test_a_window_ends_when_three_epochs_have_passed_and_not_before(desk):
    command_id = desk.command()
    desk.step(4, 0.5, desk.applied(command_id))
    for epoch in (4, 5, 6):
        desk.step(epoch, 0.4)
        assert await desk.listed() == []
    desk.step(7, 0.3)
    (report,) = await desk.listed()
    assert (report.observation_window_epochs, report.metrics["steps"]) == (3, 4)


async def test_a_report_tells_whose_command_it_was_and_what_came_of_it(desk, clock):
    command_id = desk.command(seed_id="seed-1", blueprint_id="lora_linear")
    report = await desk.observe(command_id, losses=(0.5, 0.6, 0.4, 0.25), hook_latency_ms=2.0)
    assert report.report_id == f"fr-synth-{command_id}"
    assert (report.version, report.training_run_id, report.seed_id) == (1, "run", "seed-1")
    assert (report.blueprint_id, report.tamiyo_policy_version) == ("lora_linear", "prior-1")
    assert report.issued_at.ToNanoseconds() == int(clock() * 1e9)
    told = {name: round(value, 4) for name, value in report.metrics.items()}
    assert told == {
        "steps": 3, "criticals": 0, "loss_not_finite": 0, "breaker_transitions": 0, "loss_at_application": 0.5,
        "loss_at_end": 0.25, "loss_delta": -0.25, "worst_demand": 0, "risk_score": 0, "decision_ms": 1.5,
        "hook_latency_ms": 2.0, "hook_latency_ms_delta": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("latency", [math.nan, math.inf])
async def test_a_latency_that_is_no_number_is_left_out(desk, latency):
    report = await desk.observe(desk.command(), hook_latency_ms=latency)
    assert all(map(math.isfinite, report.metrics.values()))


async def test_a_command_that_plants_nothing_is_about_the_blueprint_that_was_planted(desk):
    command_id = desk.command(blueprint_id="", planted={"seed-0": "norm_affine"})
    assert (await desk.observe(command_id)).blueprint_id == "norm_affine"


@pytest.mark.parametrize(
    ("losses", "outcome"),
    [
        ((0.5, 0.6, 0.7, 0.4), SUCCESS),
        ((0.5, 0.4, 0.3, 0.6), REGRESSION),
        ((0.5, 0.1, 0.9, 0.5), NEUTRAL),
        ((None, None, None, None), NEUTRAL),
        ((None, 0.5, 0.4, 0.3), NEUTRAL),
        ((0.5, math.nan, 0.4, 0.3), REGRESSION),
        ((0.5, 0.4, 0.3, math.inf), REGRESSION),
        ((0.5, 1e30, 0.4, 0.3), SUCCESS),
    ],
)
async def test_the_judgement_follows_the_sum_of_the_changes_of_the_loss(desk, losses, outcome):
    report = await desk.observe(desk.command(), losses)
    assert report.outcome == outcome
    if all(loss is not None and loss < 10 for loss in losses):
        changes = math.fsum(after - before for before, after in pairwise(losses))
        assert report.metrics["loss_delta"] == pytest.approx(changes)


async def test_a_critical_step_is_a_regression_whatever_the_loss(desk):
    command_id = desk.command()
    desk.step(0, 0.5, desk.applied(command_id))
    desk.step(1, 0.4, verdict=desk.CRITICAL)
    desk.step(3, 0.1)
    (report,) = await desk.listed()
    assert (report.outcome, report.metrics["criticals"], report.metrics["worst_demand"]) == (REGRESSION, 1, 5)
    assert report.metrics["reason.bsds_hazard_critical"] == 1
    assert [action.action_type for action in report.follow_up_actions] == ["CONSERVATIVE_MODE"]


async def test_what_was_critical_before_the_command_is_not_held_against_it(desk):
    earlier, later = desk.command(), desk.command()
    desk.step(0, 0.5, desk.applied(earlier))
    desk.step(1, 0.5, verdict=desk.CRITICAL)
    desk.step(1, 0.5, desk.applied(later))
    desk.step(4, 0.4)
    outcomes = {report.command_id: report.outcome for report in await desk.listed()}
    assert outcomes == {earlier: REGRESSION, later: SUCCESS}


async def test_moves_of_the_breaker_within_the_window_are_counted(desk):
    desk.observations.note_breaker()
    desk.step(0, 0.5, desk.applied(desk.command()))
    desk.observations.note_breaker()
    desk.observations.note_breaker()
    desk.step(3, 0.4)
    assert (await desk.listed())[0].metrics["breaker_transitions"] == 2


async def test_an_outcome_that_comes_twice_makes_one_report(desk):
    command_id = desk.command()
    desk.step(0, 0.5, desk.applied(command_id), desk.applied(command_id))
    desk.step(1, 0.4, desk.applied(command_id))
    desk.step(3, 0.3)
    assert len(await desk.listed()) == 1
    desk.step(4, 0.3, desk.applied(command_id))
    assert len(await desk.listed()) == 1
    assert not desk.observations.watched


async def test_an_outcome_of_an_unknown_command_makes_none(desk):
    assert await desk.observe("nobody-knows-it") is None
    assert not desk.observations.watched


async def test_a_run_that_tells_of_a_command_of_another_makes_none_and_spoils_none(desk):
    command_id = desk.command(run_id="run")
    desk.step(0, 0.5, desk.applied(command_id), run_id="thief")
    desk.step(3, 0.4, run_id="thief")
    assert (await desk.observe(command_id)).training_run_id == "run"
    assert len(await desk.listed()) == 1


async def test_a_command_that_failed_is_aborted_when_the_window_ends(desk):
    desk.step(0, 0.5, desk.failed(desk.command(), "no_memory"))
    desk.step(2, 0.4)
    assert await desk.listed() == []
    desk.step(3, 0.3)
    (report,) = await desk.listed()
    assert (report.outcome, report.notes) == (ABORTED, "not carried out: no_memory")


async def test_a_failure_that_turns_out_to_be_none_is_observed_from_then_on(desk):
    command_id = desk.command()
    desk.step(0, 0.9, desk.failed(command_id))
    await desk.reports.catch_up()
    desk.step(2, 0.5, desk.applied(command_id))
    desk.step(4, 0.4)
    assert await desk.listed() == []
    desk.step(5, 0.3)
    (report,) = await desk.listed()
    assert (report.outcome, report.metrics["loss_at_application"]) == (SUCCESS, pytest.approx(0.5))


async def test_a_failure_that_comes_after_the_success_changes_nothing(desk):
    command_id = desk.command()
    desk.step(0, 0.5, desk.applied(command_id))
    desk.step(0, 0.5, desk.failed(command_id))
    desk.step(3, 0.3)
    assert (await desk.listed())[0].outcome == SUCCESS


@pytest.mark.parametrize("result", ["RESULT_REJECTED", "RESULT_LATE", "RESULT_QUEUED", "RESULT_LOCAL_FALLBACK"])
async def test_what_changed_nothing_is_not_observed(desk, result):
    desk.step(0, 0.5, CommandOutcome(command_id=desk.command(), result=result))
    desk.step(3, 0.3)
    assert await desk.listed() == []
    assert not desk.observations.watched


async def test_a_run_that_is_closed_cuts_its_windows_short(desk):
    desk.step(0, 0.5, desk.applied(desk.command()))
    desk.step(1, 0.1)
    desk.observations.note_closed("run")
    (report,) = await desk.listed()
    assert (report.outcome, report.observation_window_epochs) == (ABORTED, 1)
    assert report.notes == "ended before its time: the run was closed"
    assert not desk.observations.watched


async def test_another_seed_host_cuts_the_windows_of_the_one_before_short(desk):
    first, second = desk.command(), desk.command()
    desk.step(0, 0.5, desk.applied(first))
    desk.step(1, 0.4, desk.applied(second), host=OTHER_HOST)
    desk.step(4, 0.3, host=OTHER_HOST)
    outcomes = {report.command_id: report.outcome for report in await desk.listed()}
    assert outcomes == {first: ABORTED, second: SUCCESS}


@pytest.mark.parametrize("epochs", [[0] * 50, [5, 4, 3, 2, 1, 0], [0, 1, 2, 0, 1, 2]])
async def test_a_run_that_never_gets_on_is_observed_until_the_retention_ends(desk, clock, epochs):
    command_id = desk.command()
    desk.step(epochs[0], 0.5, desk.applied(command_id))
    for epoch in epochs:
        desk.step(epoch, 0.4)
    assert await desk.listed() == []
    clock.advance(86_401)
    await desk.reports.prune()
    (report,) = await desk.listed()
    assert (report.outcome, report.notes) == (ABORTED, "ended before its time: the run did not reach the epoch")
    assert not desk.observations.watched


async def test_epochs_that_are_skipped_have_passed(desk):
    desk.step(0, 0.5, desk.applied(desk.command()))
    desk.step(100, 0.4)
    (report,) = await desk.listed()
    assert (report.outcome, report.observation_window_epochs) == (SUCCESS, 100)


async def test_who_has_the_most_windows_makes_room(start):
    desk = start(config=ReportConfig(max_windows=3))
    greedy, modest = [desk.command("greedy") for _ in range(5)], desk.command("modest")
    desk.step(0, 0.5, desk.applied(modest), run_id="modest")
    for command_id in greedy:
        desk.step(0, 0.5, desk.applied(command_id), run_id="greedy")
    cut = await desk.listed()
    assert [report.command_id for report in cut] == greedy[:3]
    assert {report.notes for report in cut} == {"ended before its time: newer windows took its place"}
    desk.step(3, 0.4, run_id="modest")
    assert (await desk.listed())[-1].outcome == SUCCESS


async def test_outcomes_of_commands_that_do_not_exist_take_no_room_for_long(start):
    desk = start(config=ReportConfig(max_windows=3))
    command_id = desk.command("honest")
    desk.step(0, 0.5, desk.applied(command_id), run_id="honest")
    desk.step(0, 0.5, *(desk.applied(f"made-up-{n}") for n in range(200)), run_id="liar")
    desk.step(3, 0.4, run_id="honest")
    assert [report.command_id for report in await desk.listed()] == [command_id]
    assert not desk.observations.watched


async def test_steps_of_runs_that_nobody_observes_are_not_kept(desk):
    for _ in range(100):
        desk.step(0, 0.5)
    assert len(desk.observations) == 0


async def test_observations_are_bounded_and_what_is_lost_is_told(start):
    desk = start()
    desk.observations._capacity = 10
    desk.step(0, 0.5, desk.applied(desk.command()))
    for _ in range(20):
        desk.step(0, 0.4)
    assert len(desk.observations) == 10
    with capture_logs() as told:
        await desk.reports.catch_up()
        await desk.reports.catch_up()
    assert [(entry["event"], entry["lost"]) for entry in told] == [("field_report_observations_lost", 11)]


def test_a_new_run_is_watched_from_its_first_outcome_on():
    assert Observations().watched == set()
