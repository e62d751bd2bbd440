"""The plan for CUDA devices on the CPU: the same class, operation by operation. What only a device can show is below."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from prometheus_client import REGISTRY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import SeedState, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite
from esper_servers.policy import cuda_plan, sample
from esper_servers.policy.compiled_plan import plan_inputs
from esper_servers.policy.cuda_device import MEGABYTE, VramBudget, find_device, lane_of
from esper_servers.policy.cuda_plan import IDLE_SECONDS, TOLERANCE, CudaPlan, DeviceTimes
from esper_servers.policy.dense_plan import DensePlan
from esper_servers.policy.edge_scores import EdgeScores
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import RunSignals

HOST = torch.device("cpu")
SIGNALS = RunSignals(steps=0, steps_since_germination=0, loss_trend=0.0, loss_volatility=0.0, steps_since_optimizer=0)
needs_device = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


def packet(loss):
    return SystemStatePacket(training_metrics={"loss": loss}, seed_states=sample.sample_states(1))


def graph_of(seeds=4):
    sites = [RunSite(site_id=f"l{n}") for n in range(seeds)]
    run_seeds = [RunSeed(seed_id=f"s{n}", site_id=f"l{n}") for n in range(seeds)]
    topology = sample.sample_topology() if seeds else {}
    return RunGraph(topology, sites, run_seeds, [])


def ask(policy, graph):
    seeds = [SeedState(seed_id=seed_id) for seed_id in graph.seed_ids]
    return policy.evaluate(graph.fill(packet(0.5)), seeds, SIGNALS)


def assert_near(found, expected, tolerance):
    for name, ours, theirs in zip(expected._fields, found, expected, strict=True):
        assert (ours.dtype, ours.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture(scope="module")
def policy():
    return Policy.initial(seed=3)


@pytest.mark.parametrize("seeds", [0, 1, 4, 9])
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, TOLERANCE)], ids=["float32", "bfloat16"])
def test_its_heads_are_those_of_the_eager_plan_step_after_step(policy, seeds, autocast, tolerance):
    graph = graph_of(seeds)
    plan = CudaPlan(policy.network, HOST, autocast=autocast)
    plan.prepare(graph.inputs)
    for loss in (0.5, 40.0):
        inputs = graph.fill(packet(loss))
        assert_near(plan(inputs), policy.compute(inputs), tolerance)


def test_products_are_computed_in_bfloat16(policy):
    graph = graph_of()
    plan, exact = CudaPlan(policy.network, HOST), CudaPlan(policy.network, HOST, autocast=False)
    for each in (plan, exact):
        each.prepare(graph.inputs)
    inputs = graph.fill(packet(0.5))
    assert not torch.allclose(plan(inputs).kind, exact(inputs).kind, rtol=0, atol=1e-5)


def test_several_graphs_are_kept_apart_and_what_was_returned_stays(policy):
    graphs = [graph_of(seeds) for seeds in (2, 5)]
    plan = CudaPlan(policy.network, HOST, autocast=False)
    for graph in graphs:
        plan.prepare(graph.inputs)
    first = plan(graphs[0].fill(packet(0.5)))
    kept = copy.deepcopy(first)
    for graph, loss in itertools.product(graphs, (3.0, 7.0)):
        inputs = graph.fill(packet(loss))
        assert_near(plan(inputs), policy.compute(inputs), 1e-5)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, kept, strict=True))


def test_the_network_that_it_was_made_of_is_left_alone(policy):
    graph = graph_of()
    network = copy.deepcopy(policy.network)
    plan = CudaPlan(network, HOST, autocast=False)
    plan.prepare(graph.inputs)
    before = plan(graph.fill(packet(0.5)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(before.operation, plan(graph.inputs).operation)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_graph_that_is_not_prepared_is_missed_until_it_is(policy):
    graph = graph_of()
    plan = CudaPlan(policy.network, HOST)
    assert plan.missed is None
    assert plan(graph.inputs) is None
    assert plan.missed is graph.inputs
    plan.prepare(graph.inputs)
    assert (plan.missed, plan.covers(graph.inputs)) == (None, True)


def test_a_graph_beyond_the_limit_of_cells_is_not_taken(policy, monkeypatch):
    monkeypatch.setattr(cuda_plan, "CELL_LIMIT", 10)
    graph = graph_of()
    plan = CudaPlan(policy.network, HOST)
    plan.prepare(graph.inputs)
    assert (plan(graph.inputs), plan.missed) == (None, None)


def test_a_graph_that_is_gone_leaves_its_place(policy):
    graph = graph_of()
    plan = CudaPlan(policy.network, HOST)
    plan.prepare(graph.inputs)
    assert len(plan._slots) == 1
    del graph
    gc.collect()
    assert len(plan._slots) == 0


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_when_all_places_are_taken_the_least_recently_used_leaves_if_it_is_idle(policy):
    clock, (old, busy, new) = Clock(), (graph_of(seeds) for seeds in (1, 2, 3))
    plan = CudaPlan(policy.network, HOST, most_graphs=2, clock=clock)
    plan.prepare(busy.inputs)
    plan.prepare(old.inputs)
    clock.now = IDLE_SECONDS - 1
    plan(busy.inputs)
    plan.prepare(new.inputs)
    assert [plan.covers(graph.inputs) for graph in (old, busy, new)] == [True, True, False]
    clock.now = IDLE_SECONDS + 1
    plan.prepare(new.inputs)
    assert [plan.covers(graph.inputs) for graph in (old, busy, new)] == [False, True, True]


def test_what_is_captured_is_launched_again_after_it_was_warmed_up(policy):
    graph, launches = graph_of(), []

    def capture(launch):
        output = launch()

        def replay():
            launches.append(1)
            return output.copy_(launch())

        return replay

    plan = CudaPlan(policy.network, HOST, autocast=False, capture=capture)
    plan.prepare(graph.inputs)
    assert launches == []
    for loss in (0.5, 3.0):
        inputs = graph.fill(packet(loss))
        assert_near(plan(inputs), policy.compute(inputs), 1e-5)
    assert launches == [1, 1]


class SeenTensors(TorchDispatchMode):
    """Notes on which devices the operations are that run within."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        found = operation(*arguments, **(named or {}))
        self.devices |= {each.device.type for each in tree_leaves((arguments, named, found)) if hasattr(each, "device")}
        return found


def test_nothing_of_what_is_captured_touches_the_host(policy):
    """A capture fails at whatever waits for the device, such as a number of the host in an operation."""
    module = copy.deepcopy(DensePlan(policy.network)).to("meta")
    tensors = [tensor.to("meta") for tensor in plan_inputs(graph_of().inputs, EdgeScores(policy.network))]
    with torch.inference_mode(), SeenTensors() as seen:
        module(tensors)
    assert seen.devices == {"meta"}


def refuse(_launch):
    raise RuntimeError("operation not permitted when stream is capturing")


def fallbacks():
    return REGISTRY.get_sample_value("esper_plan_fallbacks_total")


def test_a_graph_that_cannot_be_captured_is_told_once_and_left_to_the_cpu():
    graph, counted = graph_of(), fallbacks()
    served = Policy.initial()
    served.serve_on_device(CudaPlan(served.network, HOST, capture=refuse))
    for _ in range(3):
        output = ask(served, graph)
        if served.missed is not None:
            served.prepare(served.missed)
    assert (output.plan, served.plan, served.missed) == ("eager", "cuda", None)
    assert served.plan_problem == "graph_not_prepared: operation not permitted when stream is capturing"
    assert fallbacks() == counted + 1


def test_a_device_that_fails_leaves_all_to_the_plan_below_it():
    graph, counted = graph_of(), fallbacks()
    served = Policy.initial()
    served.serve_compiled(DensePlan(served.network))
    failing = []

    def capture(launch):
        def replay():
            if failing:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return launch()

        return replay

    served.serve_on_device(CudaPlan(served.network, HOST, capture=capture))
    served.warm_up(graph.inputs)
    plans = [ask(served, graph).plan]
    failing.append(True)
    plans += [ask(served, graph).plan for _ in range(2)]
    assert plans == ["cuda", "compiled", "compiled"]
    assert (served.plan, served.plan_problem) == ("compiled", "cuda_plan_failed: CUDA out of memory")
    assert fallbacks() == counted + 1


def test_a_policy_is_served_by_its_device_where_a_graph_is_prepared():
    prepared, other = graph_of(2), graph_of(3)
    served = Policy.initial(seed=3)
    served.serve_on_device(CudaPlan(served.network, HOST))
    served.prepare(prepared.inputs)
    outputs = [ask(served, graph) for graph in (prepared, other)]
    assert [output.plan for output in outputs] == ["cuda", "eager"]
    assert served.plan == "cuda"
    assert served.can_run_beside(prepared.inputs)
    assert not served.can_run_beside(other.inputs)
    assert not served.can_share(other.inputs)


def test_what_it_takes_of_the_device_can_be_read(policy):
    graph = graph_of()
    budget = VramBudget(limit=2048, free=lambda: 0, peak=lambda: 1024)
    plan = CudaPlan(policy.network, HOST, budget=budget)
    assert plan.use.times == DeviceTimes()
    plan.prepare(graph.inputs)
    plan(graph.inputs)
    assert plan.use[:3] == ("cpu", 1024, 2048)
    assert all(part > 0 for part in plan.use.times)


@pytest.mark.parametrize(("free", "peak", "problem"), [
    (2000, 0, "vram_mb = 2048, and only 2000 MB of the device are free"),
    (4096, 2049, "vram_mb = 2048, and the plan took 2049 MB"),
    (2048, 2048, ""),
])  # fmt: skip
def test_a_budget_is_refused_when_it_is_not_there_and_when_it_is_exceeded(free, peak, problem):
    budget = VramBudget(limit=2048 * MEGABYTE, free=lambda: free * MEGABYTE, peak=lambda: peak * MEGABYTE)
    found = ""
    try:
        budget.check_room()
        budget.check_peak()
    except ConfigError as error:
        found = error.message
    assert problem in found
    assert bool(problem) == bool(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a CUDA device")
def test_without_a_device_auto_is_the_cpu_and_cuda_says_what_is_missing():
    assert find_device("cpu") is None
    assert find_device("auto") is None
    with pytest.raises(ConfigError, match="No CUDA device can be used: torch"):
        find_device("cuda")


class TestOnDevice:
    """What only a device can show."""

    pytestmark = needs_device

    @pytest.fixture
    def device(self):
        return find_device("cuda")

    def test_graphs_of_two_structures_are_replayed_in_any_order(self, policy, device):
        graphs = [graph_of(seeds) for seeds in (2, 9)]
        plan = CudaPlan(policy.network, device)
        for graph in graphs:
            plan.prepare(graph.inputs)
        for graph, loss in itertools.product([*graphs, *reversed(graphs)], (0.5, 40.0)):
            inputs = graph.fill(packet(loss))
            assert_near(plan(inputs), policy.compute(inputs), TOLERANCE)

    def test_a_replay_computes_what_a_plain_launch_does(self, policy, device):
        graph = graph_of()
        replayed = CudaPlan(policy.network, device)
        launched = CudaPlan(policy.network, device, capture=lambda launch: launch)
        for plan in (replayed, launched):
            plan.prepare(graph.inputs)
        for loss in (0.5, 40.0):
            inputs = graph.fill(packet(loss))
            assert_near(replayed(inputs), launched(inputs), 1e-3)

    def test_another_policy_is_served_with_its_own_weights(self, policy, device):
        graph, other = graph_of(), Policy.initial(seed=4)
        plans = {each: CudaPlan(each.network, device) for each in (policy, other)}
        for plan in plans.values():
            plan.prepare(graph.inputs)
        inputs = graph.fill(packet(0.5))
        for each, plan in plans.items():
            assert_near(plan(inputs), each.compute(inputs), TOLERANCE)

    def test_a_graph_is_prepared_after_all_others_are_gone(self, policy, device):
        plan = CudaPlan(policy.network, device)
        for seeds in (2, 3):
            graph = graph_of(seeds)
            plan.prepare(graph.inputs)
            assert plan(graph.inputs) is not None
            del graph
            gc.collect()
        assert len(plan._slots) == 0

    def test_steps_go_on_while_another_graph_is_captured(self, policy, device):
        served, others = graph_of(4), [graph_of(seeds) for seeds in range(5, 12)]
        plan = CudaPlan(policy.network, device)
        plan.prepare(served.inputs)
        expected = policy.compute(served.fill(packet(0.5)))
        captures = [lane_of(device).capturer.submit(plan._prepare, other.inputs) for other in others]
        while not all(capture.done() for capture in captures):
            assert_near(plan(served.inputs), expected, TOLERANCE)
        for capture, other in zip(captures, others, strict=True):
            capture.result()
            assert_near(plan(other.inputs), policy.compute(other.inputs), TOLERANCE)

    def test_the_default_budget_holds_with_many_graphs(self, policy, device):
        budget = VramBudget.on(device, 2048 * MEGABYTE)
        graphs = [graph_of(seeds) for seeds in range(64)]
        plan = CudaPlan(policy.network, device, budget=budget)
        for graph in graphs:
            plan.prepare(graph.inputs)
            assert plan(graph.inputs) is not None
        budget.check_peak()
        assert plan.use.name == torch.cuda.get_device_name(device)
        assert all(part > 0 for part in plan.use.times)
