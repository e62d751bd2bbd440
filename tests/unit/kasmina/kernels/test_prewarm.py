from __future__ import annotations

import threading

import pytest
import torch

from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.kernels.background import BackgroundWorker
from esper_servers.kasmina.limits import LocalLimits

APPLIED, FAILED, REJECTED = (
    CommandOutcome.RESULT_APPLIED,
    CommandOutcome.RESULT_FAILED,
    CommandOutcome.RESULT_REJECTED,
)


@pytest.fixture
def waiting():
    """Work that was left for a worker and is not done yet."""
    return []


@pytest.fixture
def rig_beside(make_rig, waiting):
    return lambda **fields: make_rig(options={"background": waiting.append}, **fields)


def submit(rig, command=None):
    command = command or rig.command("GERMINATE", blueprint="residual_mlp")
    rig.host.submit(rig.envelope(command))
    return command


def test_a_module_is_built_beside_the_training_and_planted_at_a_safe_point(rig_beside, waiting, make_rig):
    rig = rig_beside()
    command = submit(rig)
    assert rig.host.apply_pending() == []
    assert rig.host.apply_pending() == []
    [build] = waiting
    assert rig.slot.stage == lifecycle.DORMANT
    build()
    [outcome] = rig.host.apply_pending()
    assert (outcome.result, rig.slot.stage) == (APPLIED, lifecycle.GERMINATED)
    at_once = make_rig()
    at_once.order(command)
    weights, expected = rig.slot.site.seed.state_dict(), at_once.slot.site.seed.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_module_that_is_never_done_is_given_up_and_the_training_goes_on(rig_beside):
    rig = rig_beside()
    submit(rig)
    rig.train(199)
    assert rig.host.queued_commands == 1
    rig.train(3)
    assert rig.host.queued_commands == 0
    assert [o.reason for o in rig.host.recent_outcomes if o.result == FAILED] == ["kernel_late"]
    assert rig.slot.stage in (lifecycle.CULLED, lifecycle.EMBARGOED)


def test_what_cannot_be_built_fails_with_its_reason(rig_beside, waiting):
    rig = rig_beside()
    submit(rig, rig.command("GERMINATE", blueprint="depthwise_conv"))
    rig.host.apply_pending()
    waiting.pop()()
    [outcome] = rig.host.apply_pending()
    assert (outcome.result, outcome.reason) == (FAILED, "shape_mismatch")


def test_a_settled_command_leaves_no_module_behind(rig_beside, waiting):
    rig = rig_beside(limits=LocalLimits(live_seeds=1))
    other = rig.seed_ids[0]
    submit(rig)
    submit(rig, rig.command("GERMINATE", blueprint="residual_mlp", seed_id=other))
    rig.host.apply_pending()
    for build in waiting:
        build()
    assert [o.result for o in rig.host.apply_pending()] == [APPLIED, REJECTED]
    assert rig.host._prewarmer.clear() == 0


def test_a_module_for_a_model_that_was_cast_meanwhile_is_built_anew(rig_beside, waiting):
    rig = rig_beside()
    submit(rig)
    rig.host.apply_pending()
    waiting.pop()()
    rig.slot.site.dtype = torch.bfloat16
    assert rig.host.apply_pending() == []
    waiting.pop()()
    assert [o.result for o in rig.host.apply_pending()] == [APPLIED]
    assert {p.dtype for p in rig.slot.site.seed.parameters()} == {torch.bfloat16}


def test_how_long_building_took_is_in_the_packet_of_the_step(rig):
    rig.do("GERMINATE", blueprint="residual_mlp")
    [points] = [packet.metrics for packet in rig.host.finalize_step(1) if packet.packet_id == "global-1"]
    known = {(p.name, p.attributes["quantile"]): p.value for p in points if p.name == "kasmina.prewarm.latency_ms"}
    assert known["kasmina.prewarm.latency_ms", "0.95"] >= known["kasmina.prewarm.latency_ms", "0.5"] > 0


def test_a_worker_does_what_was_left_in_order_on_a_thread_of_its_own_and_survives_an_error():
    worker, done, ended = BackgroundWorker("test"), [], threading.Event()

    def fail():
        done.append("failed")
        raise ValueError("once")

    for work in (lambda: done.append(threading.current_thread().name), fail, lambda: done.append("after"), ended.set):
        worker(work)
    assert ended.wait(30)
    assert done == ["test", "failed", "after"]


def test_the_thread_of_a_worker_ends_when_there_is_nothing_to_do_and_another_comes_with_work():
    worker, threads = BackgroundWorker("test", idle_seconds=0.0), []
    for _ in range(2):
        done = threading.Event()
        worker(lambda done=done: (threads.append(threading.current_thread()), done.set()))
        assert done.wait(30)
        threads[-1].join(30)
        assert not threads[-1].is_alive()
    assert threads[0] is not threads[1]
