"""The compiled plan, really built: beside a server that decides meanwhile, kept for the next start, and checked."""

from __future__ import annotations

import asyncio
import os

import pytest

from esper_client import TamiyoClient
from esper_rpc.errors import ConfigError
from esper_rpc.proto.tamiyo.v1 import GetPolicyRequest
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor
from esper_servers.policy import plan_package
from esper_servers.policy.policy import Policy
from esper_servers.tamiyo import plan_switch
from esper_servers.tamiyo.plan_switch import PlanConfig, PlanSwitch

# A build takes half a minute of an idle core; anything that takes this long hangs.
PATIENCE_SECONDS = 400.0
COMPILING = {**os.environ, "ESPER_PLAN_COMPILE": "true"}

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)


async def plan_of(home, address, wanted):
    """Ask until this plan is served."""
    async with asyncio.timeout(PATIENCE_SECONDS), TamiyoClient(address, identity=home.identity()) as client:
        while (plan := (await client.get_policy(GetPolicyRequest(), timeout=20.0)).plan) != wanted:
            await asyncio.sleep(0.2)
        return plan


@pytest.mark.skipif(not plan_package.has_compiler(), reason="there is no C++ compiler")
def test_a_plan_is_built_while_the_eager_one_serves_and_is_there_at_the_next_start(tmp_path):
    home = Home(tmp_path)
    home.prepare()
    with Supervisor(home, COMPILING) as mesh:
        assert asyncio.run(plan_of(home, mesh.addresses["tamiyo"], "eager")) == "eager"
        assert asyncio.run(plan_of(home, mesh.addresses["tamiyo"], "compiled")) == "compiled"
    (package,) = (home.state_dir("tamiyo") / "plans").iterdir()
    built_at = package.stat().st_mtime_ns
    with Supervisor(home, COMPILING) as mesh:
        assert asyncio.run(plan_of(home, mesh.addresses["tamiyo"], "compiled")) == "compiled"
    assert package.stat().st_mtime_ns == built_at
    other = Policy.initial(seed=1)
    plan_switch._check(other, plan_package.load(package, other.network))


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
    switch.prepare()
    await switch.build()
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
