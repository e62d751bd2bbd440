"""Policies that are pushed to a mesh that runs: real processes, real certificates, steps going on."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest
import safetensors.torch
from typer.testing import CliRunner

from esper_client import TamiyoClient
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, SeedLifecycleStage, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import (
    EvaluateStepRequest,
    GetPolicyRequest,
    GetStatusRequest,
    IngestPolicyUpdateRequest,
    OpenRunRequest,
    Step,
)
from esper_servers.cli import app
from esper_servers.cli.home import Home
from esper_servers.cli.policy import seal
from esper_servers.cli.processes import Supervisor
from esper_servers.policy import checkpoint, sample
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig
from esper_servers.tamiyo.policy_updates.store import MOST_KEPT

GERMINATED = SeedLifecycleStage.SEED_LIFECYCLE_STAGE_GERMINATED
METRICS = {"loss": 0.5, "gradient_norm": 1.0, "samples_per_s": 4000.0, "hook_latency_ms": 1.0}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("mesh"))
    home.prepare()
    with Supervisor(home, os.environ) as supervisor:
        yield supervisor


@pytest.fixture(scope="module")
def files(mesh, tmp_path_factory):
    """Policies of several versions, each with weights of its own."""
    directory = tmp_path_factory.mktemp("policies")

    def write(number):
        path = directory / f"{number}.safetensors"
        policy = Policy.initial(seed=number, prior_config=PriorConfig())
        policy.version = f"gnn_v1-{number}"
        path.write_bytes(checkpoint.write(policy, parent="gnn_v1-heuristic-1"))
        return path

    return write


def esper(mesh, *arguments):
    return CliRunner().invoke(app, [*arguments, "--home", str(mesh.home.directory)], obj={})


def push(mesh, file, *options):
    result = esper(mesh, "policy", "push", str(file), "--json", *options)
    return json.loads(result.stdout), result.exit_code


def live(mesh):
    return json.loads(esper(mesh, "policy", "show", "--json").stdout)


@pytest.fixture(scope="module")
def numbers():
    """Each above every one before: the tests share a mesh, in any order."""
    return itertools.count(2)


class Asking:
    """A trainer that asks one step after the other while something else goes on."""

    def __init__(self, home, run_id):
        self.home, self.run_id = home, run_id
        self.versions: Counter[str] = Counter()
        self.sequence = 0
        self.slowest = 0.0
        self.outcomes = []

    async def during(self, work):
        """Ask until the work is done, and then a few steps more; returns what the work returned."""
        async with TamiyoClient(self.home.address("tamiyo"), identity=self.home.identity("trainer")) as client:
            await client.open_run(OpenRunRequest(
                run_id=self.run_id, protocol_versions=[2], receiver_epoch=bytes(16), features=["seed"],
                sites=sample.sample_sites(), seeds=sample.sample_seeds(),
            ))  # fmt: skip
            working = asyncio.create_task(work)
            while not working.done():
                await self._ask(client)
            for _ in range(5):
                await self._ask(client)
            return await working

    async def _ask(self, client):
        self.sequence += 1
        packet = SystemStatePacket(training_metrics=METRICS, seed_states=sample.sample_states(GERMINATED))
        step = Step(run_id=self.run_id, sequence=self.sequence, budget_us=5_000_000, packet=packet)
        step.outcomes.extend(self.outcomes)
        begun = time.perf_counter()
        decision = (await client.evaluate_step(EvaluateStepRequest(step=step))).decision
        self.slowest = max(self.slowest, time.perf_counter() - begun)
        command = AdaptationCommand.FromString(decision.command.payload)
        self.versions[command.annotations["policy_version"]] += 1
        self.outcomes = [CommandOutcome(command_id=command.command_id, result=CommandOutcome.RESULT_APPLIED)]


def asking_while(mesh, run_id, function, *arguments):
    """Ask steps while a function runs on a thread; returns who asked, and what the function returned."""
    asking = Asking(mesh.home, run_id)
    return asking, asyncio.run(asking.during(asyncio.to_thread(function, *arguments)))


def test_a_policy_that_is_pushed_decides_from_one_step_to_the_next(mesh, files, numbers):
    before, number = live(mesh)["version"], next(numbers)
    asking, (answer, code) = asking_while(mesh, "run-push", push, mesh, files(number))
    assert (answer["applied"], answer["policy_version"], code) == (True, f"gnn_v1-{number}", 0), answer
    # Every step got a command, by the one policy or the other.
    assert set(asking.versions) == {before, f"gnn_v1-{number}"}
    assert live(mesh)["before"].endswith(before)


def test_a_policy_that_was_accepted_once_never_comes_back(mesh, files, numbers):
    before, file = live(mesh)["version"], files(next(numbers))
    assert push(mesh, file)[0]["applied"]
    assert push(mesh, file)[0]["reason"].startswith("version_not_above")
    assert esper(mesh, "policy", "rollback", "--reason", "test", "--dry-run").output == f"{before} would decide.\n"
    assert esper(mesh, "policy", "rollback", "--reason", "test").output == f"{before} decides.\n"
    assert live(mesh)["version"] == before
    answer, code = push(mesh, file)
    assert (answer["applied"], answer["policy_version"], code) == (False, before, 1)
    assert answer["reason"].startswith("version_not_above")


def test_a_rollback_leads_back_to_the_shipped_policy_and_no_further(mesh, files, numbers):
    assert push(mesh, files(next(numbers)))[0]["applied"]
    results = [esper(mesh, "policy", "rollback", "--reason", "test") for _ in range(MOST_KEPT)]
    assert live(mesh)["version"] == "gnn_v1-heuristic-1"
    assert (results[0].exit_code, results[-1].exit_code, results[-1].output.count("\n")) == (0, 1, 1)
    assert "No policy was live before" in results[-1].output


def test_a_policy_outlives_the_process(mesh, files, numbers):
    number = next(numbers)
    assert push(mesh, files(number))[0]["applied"]
    mesh.services["tamiyo"].process.kill()
    mesh.services["tamiyo"].process.wait()
    mesh.restart("tamiyo")
    assert live(mesh)["version"] == f"gnn_v1-{number}"
    asking, _ = asking_while(mesh, "run-restart", time.perf_counter)
    assert set(asking.versions) == {f"gnn_v1-{number}"}
    assert push(mesh, files(number))[0]["reason"].startswith("version_not_above")


def spoilt(file, number, **manifest):
    """A copy of a policy with NaN weights, or with another manifest."""
    weights = safetensors.torch.load(file.read_bytes())
    document = {**_document(file), "version": f"gnn_v1-{number}", **manifest}
    if not manifest:
        weights[min(weights)].fill_(float("nan"))
        document["digest"] = checkpoint.digest_of(weights).hex()
    path = file.with_name(f"spoilt-{number}.safetensors")
    path.write_bytes(safetensors.torch.save(weights, metadata={"manifest": orjson.dumps(document).decode()}))
    return path


def _document(file):
    with checkpoint._opened(file) as opened:
        return orjson.loads(opened.metadata()["manifest"])


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ({}, "not_finite"),
        ({"digest": "00" * 32}, "checksum_mismatch"),
        ({"architecture": "ffn_v0"}, "wrong_architecture"),
        ({"registries": {"layer_type": "00" * 32}}, "registry_mismatch: The registry layer_type was expected"),
    ],
)
def test_a_policy_that_does_not_fit_changes_nothing(mesh, files, numbers, manifest, reason):
    before, number = live(mesh), next(numbers)
    answer, code = push(mesh, spoilt(files(number), number, **manifest))
    assert (answer["applied"], code) == (False, 1)
    assert answer["reason"].startswith(reason)
    assert live(mesh) == before


def test_a_forged_update_changes_nothing(mesh, files, numbers):
    before, envelope = live(mesh), seal(mesh.home, files(next(numbers)))
    envelope.mac = bytes(32)
    answer = asyncio.run(ingest(mesh, envelope))
    assert (answer.applied, answer.reason) == (False, "invalid_signature")
    assert live(mesh) == before


async def ingest(mesh, envelope):
    async with TamiyoClient(mesh.home.address("tamiyo"), identity=mesh.home.identity()) as client:
        return await client.ingest_policy_update(IngestPolicyUpdateRequest(update=envelope))


async def policy_of(mesh):
    async with TamiyoClient(mesh.home.address("tamiyo"), identity=mesh.home.identity()) as client:
        return await client.get_policy(GetPolicyRequest())


def test_a_shadow_follows_live_steps_without_effect(mesh, files, numbers):
    before, number = live(mesh)["version"], next(numbers)
    answer, _ = push(mesh, files(number), "--shadow")
    assert (answer["applied"], answer["shadowed"], answer["policy_version"]) == (False, True, before)
    asking, followed = asking_while(mesh, "run-shadow", until_followed, mesh)
    assert set(asking.versions) == {before}
    assert followed.shadow_version == f"gnn_v1-{number}"
    assert followed.shadow_disagreed <= followed.shadow_compared
    # What ran along may go live, and is no shadow then.
    assert push(mesh, files(number))[0]["applied"]
    assert live(mesh)["shadow"] == ""


def until_followed(mesh):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = asyncio.run(policy_of(mesh))
        if found.shadow_compared >= 3:
            return found
    raise AssertionError("the shadow followed no step within 30 s")


PUSH = """
import sys
from pathlib import Path
from typer.testing import CliRunner
from esper_servers.cli import app
print("pushing", flush=True)
CliRunner().invoke(app, ["policy", "push", sys.argv[1], "--home", sys.argv[2]], obj={})
"""


@pytest.mark.parametrize("delay", [0.3, 2.0])
def test_a_controller_killed_while_a_policy_is_pushed_has_the_old_one_or_the_new_one(mesh, files, numbers, delay):
    before, number = live(mesh)["version"], next(numbers)
    arguments = [sys.executable, "-c", PUSH, str(files(number)), str(mesh.home.directory)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as pushing:
        pushing.stdout.readline()
        time.sleep(delay)  # Somewhere within the push: there is nothing to await.
        mesh.services["tamiyo"].process.kill()
        mesh.services["tamiyo"].process.wait()
        pushing.kill()
    mesh.restart("tamiyo")
    assert live(mesh)["version"] in {f"gnn_v1-{number}", before}
    answer, _ = push(mesh, files(next(numbers)))
    assert answer["applied"], answer


def test_the_admin_process_ends_with_the_controller(mesh, files, numbers):
    tamiyo = mesh.services["tamiyo"].process
    assert push(mesh, files(next(numbers)))[0]["applied"]
    beside = children_of(tamiyo.pid)
    assert beside
    tamiyo.kill()
    tamiyo.wait()
    deadline = time.monotonic() + 20
    while any(map(is_alive, beside)) and time.monotonic() < deadline:
        os.sched_yield()
    assert not any(map(is_alive, beside))
    mesh.restart("tamiyo")


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    """Whether it runs; one that nobody has buried yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_breaker_is_shown(mesh):
    async def status():
        async with TamiyoClient(mesh.home.address("tamiyo"), identity=mesh.home.identity()) as client:
            return await client.get_status(GetStatusRequest())

    assert [breaker.name for breaker in asyncio.run(status()).breakers] == [
        "inference", "urza", "field_reports", "policy_updates", "journal", "state_files",
    ]  # fmt: skip
