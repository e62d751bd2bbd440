"""The compiled plan, really built: beside a server that decides meanwhile, kept for the next start, and checked."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
import time

import pytest
import torch

from esper_client import TamiyoClient
from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.proto.tamiyo.v1 import GetPolicyRequest
from esper_rpc.telemetry.events import listen
from esper_servers.cli.bench.measure import rss_mb
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor
from esper_servers.policy import plan_package
from esper_servers.policy.compiled_plan import plan_inputs
from esper_servers.policy.edge_scores import EdgeScores
from esper_servers.policy.policy import Policy
from esper_servers.tamiyo.plans import plan_switch
from esper_servers.tamiyo.plans.plan_check import sample_inputs
from esper_servers.tamiyo.plans.plan_switch import PlanConfig, PlanSwitch

# A build takes a minute or two of an idle core; anything that takes this long hangs.
PATIENCE_SECONDS = 400.0
COMPILING = {**os.environ, "ESPER_PLAN_COMPILE": "true"}

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)


async def plan_of(home, address, wanted):
    """Ask until this plan is served."""
    async with asyncio.timeout(PATIENCE_SECONDS), TamiyoClient(address, identity=home.identity()) as client:
        while (plan := (await client.get_policy(GetPolicyRequest(), timeout=20.0)).plan) != wanted:
            await asyncio.sleep(0.2)
        return plan


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package that a server built while it served, and that it found again at its next start."""
    if not plan_package.has_compiler():
        pytest.skip("there is no C++ compiler")
    home, scratch = Home(tmp_path_factory.mktemp("home")), tmp_path_factory.mktemp("scratch")
    home.prepare()
    with Supervisor(home, {**COMPILING, "TMPDIR": str(scratch)}) as mesh:
        assert asyncio.run(plan_of(home, mesh.addresses["tamiyo"], "eager")) == "eager"
        assert asyncio.run(plan_of(home, mesh.addresses["tamiyo"], "compiled")) == "compiled"
    assert list(scratch.glob("torchinductor*")) == []
    (path,) = (home.state_dir("tamiyo") / "plans").iterdir()
    built_at = path.stat().st_mtime_ns
    with Supervisor(home, COMPILING) as mesh:
        assert asyncio.run(plan_of(home, mesh.addresses["tamiyo"], "compiled")) == "compiled"
    assert path.stat().st_mtime_ns == built_at
    return path


def test_a_plan_is_built_while_the_eager_one_serves_and_serves_the_weights_of_any_policy(package):
    for seed in (1, 2):
        policy = Policy.initial(seed=seed)
        plan_switch._check(policy, plan_package.load(package, policy.network))


def tensors_for(policy):
    return plan_inputs(sample_inputs(), EdgeScores(policy.network))


def test_both_ways_to_call_the_code_compute_the_same_bits(package):
    policy = Policy.initial()
    code, tensors = plan_package.load(package, policy.network), tensors_for(policy)
    assert all(torch.equal(a, b) for a, b in zip(code(tensors), code.compute_beside(tensors), strict=True))


def test_the_code_leaves_the_interpreter_to_others_when_told_to_and_only_then(package, interpreter_is_kept):
    policy = Policy.initial()
    code, tensors = plan_package.load(package, policy.network), tensors_for(policy)
    counted, is_over = itertools.count(), threading.Event()

    def count():
        while not is_over.is_set():
            next(counted)
            time.sleep(0)  # Hand the interpreter back, which the interval never does here.

    def most_counted(compute):
        before = next(counted)
        compute(tensors)
        return next(counted) - before

    thread = threading.Thread(target=count)
    thread.start()
    # Once or twice it changes hands when tensors are freed.
    assert max(most_counted(code) for _ in range(20)) < 5
    until = time.monotonic() + PATIENCE_SECONDS
    while (most := most_counted(code.compute_beside)) < 50 and time.monotonic() < until:
        pass
    is_over.set()
    thread.join()
    assert most >= 50


@pytest.fixture
def interpreter_is_kept():
    """No thread is made to hand over the interpreter."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(PATIENCE_SECONDS)
    yield
    sys.setswitchinterval(usual)


def test_the_code_says_what_is_wrong_with_its_inputs(package):
    policy = Policy.initial()
    code, tensors = plan_package.load(package, policy.network), tensors_for(policy)
    with pytest.raises(RuntimeError, match=f"takes {len(tensors)} tensors, not {len(tensors) - 1}"):
        code(tensors[:-1])
    with pytest.raises(RuntimeError, match="API call failed"):
        code([tensor[:1] for tensor in tensors])
    code(tensors)


def test_loading_again_and_again_takes_no_more_memory(package):
    """A policy is loaded at each update: what one load loses of 5 MB of weights would add up."""
    network = Policy.initial().network
    for _ in range(5):
        plan_package.load(package, network)
    before = rss_mb(os.getpid())
    for _ in range(20):
        plan_package.load(package, network)
    assert rss_mb(os.getpid()) < before + 20


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_package_that_was_damaged_is_not_loaded(package, tmp_path, at):
    content = bytearray(package.read_bytes())
    content[int(len(content) * at)] ^= 0xFF
    (tmp_path / "damaged.pt2").write_bytes(content)
    (tmp_path / "cut.pt2").write_bytes(content[: int(len(content) * at)])
    for name in ("damaged.pt2", "cut.pt2"):
        with pytest.raises(ConfigError, match="is not a compiled plan"):
            plan_package.load(tmp_path / name, Policy.initial().network)


@pytest.fixture
def switch(tmp_path):
    return PlanSwitch(Policy.initial(), tmp_path / "plans", PlanConfig())


async def test_a_damaged_package_is_removed_and_the_eager_plan_serves(switch):
    switch.package.parent.mkdir()
    switch.package.write_bytes(b"no archive")
    switch.prepare()
    assert switch._policy.plan == "eager"
    assert "is not a compiled plan" in switch.problem
    assert not switch.package.exists()


async def test_a_package_that_computes_something_else_is_not_served(switch, monkeypatch):
    other = Policy.initial(seed=1)
    monkeypatch.setattr(plan_package, "load", lambda _path, _network: plan_package.DensePlan(other.network))
    switch.package.parent.mkdir()
    switch.package.write_bytes(b"of other weights")
    switch.prepare()
    assert switch._policy.plan == "eager"
    assert switch.problem == "The compiled plan computes something else than the eager one."


async def test_without_a_compiler_the_eager_plan_serves_and_says_why(switch, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    heard = []
    stop = listen(heard.append)
    switch.prepare()
    await switch.build()
    stop()
    ((event,),) = (packet.events for packet in heard)
    assert (event.description, event.level) == ("plan_fallback", TelemetryLevel.TELEMETRY_LEVEL_WARNING)
    assert (event.attributes["reason"], event.attributes["plan"]) == ("there is no C++ compiler", "eager")
    assert (switch._policy.plan, switch.problem) == ("eager", "there is no C++ compiler")


async def test_a_build_that_fails_is_told_and_leaves_nothing(switch, monkeypatch):
    async def fails(_package):
        raise ConfigError("The plan was not built: no space left on device")

    monkeypatch.setattr(plan_switch, "build_beside", fails)
    switch.prepare()
    await switch.build()
    assert switch.problem.endswith("no space left on device")


async def test_a_build_that_is_given_up_leaves_no_process_and_no_file(tmp_path):
    package = tmp_path / "plans" / "given-up.pt2"
    building = asyncio.create_task(plan_switch.build_beside(package))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not list(tmp_path.glob("plans/build-*")):
            await asyncio.sleep(0.01)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert list((tmp_path / "plans").iterdir()) == []
