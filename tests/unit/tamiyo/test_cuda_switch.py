"""Which policies a CUDA device serves, and what is told when it does not. The CPU stands for the device."""

from __future__ import annotations

import pytest
import torch
from prometheus_client import REGISTRY

from esper_rpc.config import load
from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import OpenRunRequest
from esper_servers.policy import cuda_device, cuda_plan, sample
from esper_servers.policy.cuda_device import MEGABYTE, VramBudget
from esper_servers.policy.cuda_plan import CudaPlan
from esper_servers.policy.dense_plan import DensePlan
from esper_servers.policy.policy import Policy
from esper_servers.tamiyo.breakers import Breakers
from esper_servers.tamiyo.conservative_mode import ConservativeMode
from esper_servers.tamiyo.plans import cuda_switch
from esper_servers.tamiyo.plans.cuda_switch import CudaSwitch
from esper_servers.tamiyo.plans.plan_switch import PlanConfig, PlanSwitch
from esper_servers.tamiyo.run_state import Runs
from esper_servers.tamiyo.server_config import TamiyoServerConfig
from esper_servers.tamiyo.status import merged, status_of
from esper_servers.tamiyo.step_parts import StepParts
from esper_servers.tamiyo.step_processes.held_runs import HeldRuns
from esper_servers.tamiyo.step_processes.run_directory import RunDirectory


def budget_with(free_mb=4096, peak_mb=100):
    return lambda _device, limit: VramBudget(
        limit=limit, free=lambda: free_mb * MEGABYTE, peak=lambda: peak_mb * MEGABYTE
    )


def switch_with(find=lambda _wanted: torch.device("cpu"), **figures):
    return CudaSwitch("auto", 2048, find=find, budget_on=budget_with(**figures))


def told(capsys):
    return capsys.readouterr().out.count("plan_fallback")


@pytest.fixture(autouse=True)
def products_of_others_stay(monkeypatch):
    monkeypatch.setattr(cuda_device, "allow_tf32", lambda: None)


@pytest.fixture
def policy():
    return Policy.initial()


def test_the_device_serves_a_policy_that_is_within_its_budget(policy):
    switch = switch_with()
    switch.give(policy)
    assert (policy.plan, switch.problem) == ("cuda", "")
    assert policy.device_use[:3] == ("cpu", 100 * MEGABYTE, 2048 * MEGABYTE)


def test_where_no_device_is_wanted_or_there_none_is_used_and_nothing_is_told(policy, capsys):
    switch = switch_with(find=lambda _wanted: None)
    switch.give(policy)
    assert (policy.plan, switch.problem, told(capsys)) == ("eager", "", 0)


@pytest.mark.parametrize(("figures", "problem"), [
    ({"free_mb": 1000}, "[plan] vram_mb = 2048, and only 1000 MB of the device are free."),
    ({"peak_mb": 3000}, "[plan] vram_mb = 2048, and the plan took 3000 MB."),
], ids=["room", "peak"])  # fmt: skip
def test_a_budget_that_does_not_hold_leaves_the_cpu_to_serve_and_is_told_once(policy, figures, problem, capsys):
    switch = switch_with(**figures)
    counted = REGISTRY.get_sample_value("esper_plan_fallbacks_total")
    for each in (policy, Policy.initial(seed=1)):
        switch.give(each)
        assert each.plan == "eager"
    assert switch.problem == problem
    assert told(capsys) == 1
    assert REGISTRY.get_sample_value("esper_plan_fallbacks_total") == counted + 1


def test_what_others_take_of_the_device_later_is_no_matter_to_the_policy_that_comes_then(policy):
    free = [4096 * MEGABYTE, 0]
    switch = CudaSwitch(
        "auto", 2048, find=lambda _wanted: torch.device("cpu"),
        budget_on=lambda _device, limit: VramBudget(limit=limit, free=lambda: free.pop(0), peak=lambda: 0),
    )  # fmt: skip
    for each in (policy, Policy.initial(seed=1)):
        switch.give(each)
        assert each.plan == "cuda"


def test_a_device_that_fails_while_it_is_prepared_leaves_the_cpu_to_serve(policy):
    def broken(_device, _limit):
        raise RuntimeError("CUDA error: unknown error")

    switch = CudaSwitch("cuda", 2048, find=lambda _wanted: torch.device("cpu"), budget_on=broken)
    switch.give(policy)
    assert (policy.plan, switch.problem) == ("eager", "CUDA error: unknown error")


def test_a_device_that_computes_something_else_does_not_serve(policy, monkeypatch):
    other = Policy.initial(seed=1)

    class OfOtherWeights(cuda_plan.CudaPlan):
        def __init__(self, _network, *arguments, **named):
            super().__init__(other.network, *arguments, **named)

    monkeypatch.setattr(cuda_switch, "CudaPlan", OfOtherWeights)
    switch = switch_with()
    switch.give(policy)
    assert (policy.plan, switch.problem) == ("eager", "The cuda plan computes something else than the eager one.")


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A package of an earlier start, for which the dense plan stands."""
    monkeypatch.setattr("esper_servers.policy.plan_package.has_compiler", lambda: True)
    monkeypatch.setattr("esper_servers.policy.plan_package.load", lambda _path, network: DensePlan(network))
    (tmp_path / "plans").mkdir()

    def switch(policy, cuda):
        found = PlanSwitch(policy, tmp_path / "plans", PlanConfig(), cuda)
        found.package.write_bytes(b"")
        return found

    return switch


def test_the_compiled_plan_stands_below_the_device_for_this_policy_and_the_next(policy, compiled):
    plans = compiled(policy, switch_with())
    plans.prepare()
    for each in (policy, plans.fit(Policy.initial(seed=1))):
        assert (each.plan, each.has_compiled, each.plan_problem) == ("cuda", True, "")
    assert plans.served == plans.package


def test_without_the_device_the_compiled_plan_serves_and_every_policy_says_why(policy, compiled):
    plans = compiled(policy, switch_with(free_mb=1))
    plans.prepare()
    for each in (policy, plans.fit(Policy.initial(seed=1))):
        assert each.plan == "compiled"
        assert each.plan_problem == "[plan] vram_mb = 2048, and only 1 MB of the device are free."


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a CUDA device")
def test_a_device_that_is_wanted_and_not_there_is_explained(policy, tmp_path):
    plans = PlanSwitch(policy, tmp_path, PlanConfig(compile=False, device="cuda"))
    plans.prepare()
    assert policy.plan == "eager"
    assert policy.plan_problem.startswith("No CUDA device can be used: torch")


def test_the_settings_name_the_devices_that_there_are(tmp_path):
    settings = tmp_path / "esper.toml"
    settings.write_text("[plan]\ndevice = 'tpu'\n")
    with pytest.raises(ConfigError, match="device = 'tpu' is unknown; choose auto, cpu or cuda"):
        load(PlanConfig, "plan", path=settings, environ={})
    with pytest.raises(ConfigError, match="vram_mb = 1 is out of range"):
        load(PlanConfig, "plan", path=None, environ={"ESPER_PLAN_VRAM_MB": "1"})


def test_the_status_tells_what_is_taken_of_the_device_and_of_any_process_why_it_is_not(controller):
    policy, pipeline = controller.policy, controller.pipeline
    without = status_of(pipeline, controller.pipeline._blueprints)
    assert (without.plan, without.HasField("device"), without.plan_problem) == ("eager", False, "")
    switch_with().give(policy)
    policy.plan_problem = "there is no C++ compiler"
    status = merged([without, status_of(pipeline, controller.pipeline._blueprints)])
    assert status.plan_problem == "there is no C++ compiler"
    device = status_of(pipeline, controller.pipeline._blueprints).device
    assert (device.name, device.peak_bytes, device.budget_bytes) == ("cpu", 100 * MEGABYTE, 2048 * MEGABYTE)
    assert device.compute_us > 0


@pytest.fixture
async def parts(tmp_path, keyring):
    """What a process has that answers steps, by a policy that a device serves."""
    mode = ConservativeMode()
    config = TamiyoServerConfig(identity_dir=tmp_path, state_dir=tmp_path, keyring=keyring)
    found = StepParts(config, mode, Breakers(mode), Runs())
    policy = found.pipeline.policy
    policy.serve_on_device(CudaPlan(policy.network, torch.device("cpu")))
    yield found
    await found.close()


async def test_the_graph_of_a_run_is_prepared_before_its_first_step(parts):
    runs = HeldRuns(parts.pipeline, parts.blueprints, RunDirectory().seen_by)
    request = OpenRunRequest(run_id="run", sites=sample.sample_sites(), seeds=sample.sample_seeds())
    await runs.open(request, "somebody", protocol_version=1)
    assert parts.pipeline.policy.can_run_beside(parts.pipeline.runs.find("run").graph.inputs)


async def test_a_graph_that_was_not_prepared_is_so_beside_the_steps(parts):
    policy = parts.pipeline.policy
    request = OpenRunRequest(run_id="run", seeds=sample.sample_seeds())
    parts.pipeline.runs.open(request, "somebody", [], 0)
    run = parts.pipeline.runs.find("run")
    packet = SystemStatePacket(seed_states=sample.sample_states(1))

    def plan():
        return policy.evaluate(run.graph.fill(packet), run.ordered_seeds(packet), run.signals()).plan

    plans = [plan()]
    await parts.prepare_missed()
    await parts.prepare_missed()
    assert [*plans, plan()] == ["eager", "cuda"]
    await parts.tell_device()
    seconds = [
        REGISTRY.get_sample_value("esper_plan_device_part_seconds", {"part": p})
        for p in ("copy_in", "compute", "copy_out")
    ]
    assert all(0 < each < 10 for each in seconds)
