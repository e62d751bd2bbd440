"""Two ranks of DistributedDataParallel under one mesh: processes of their own, over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.proto.tolaria.v1 import RollbackTier
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor, cli_command
from esper_servers.kasmina import lifecycle

FORKS = Path(__file__).with_name("forks.py")
SIZE = 2
PATIENCE_SECONDS = 150.0

pytestmark = pytest.mark.timeout(300)


class Ranks:
    """A process that forks both ranks of each scenario, so that torch is imported once."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(FORKS)], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._answer()

    def start(self, scenario, directory):
        directory.mkdir(exist_ok=True, parents=True)
        self._process.stdin.write(f"{scenario} {directory}\n")
        self._process.stdin.flush()

    def end(self, directory, lost=()):
        codes = self._answer()
        for rank, code in enumerate(codes):
            assert rank in lost or code == 0, (directory / f"said-{rank}").read_text()[-3000:]
        files = [directory / f"rank-{rank}.pt" for rank in range(SIZE)]
        return [torch.load(file, weights_only=False) for file in files if file.exists()]

    def run(self, scenario, directory, **options):
        self.start(scenario, directory)
        return self.end(directory, **options)

    def close(self):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, "the process that forks the ranks is gone"
        return json.loads(line)


@pytest.fixture(scope="module")
def ranks():
    found = Ranks()
    yield found
    found.close()


def differences(left, right, path=""):
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [path]
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        return [each for key in left for each in differences(left[key], right[key], f"{path}.{key}")]
    if isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        return [
            each for i, pair in enumerate(zip(left, right, strict=True)) for each in differences(*pair, f"{path}.{i}")
        ]
    return [] if left == right or (left != left and right != right) else [path]


def assert_alike(results):
    """Host, seeds, their optimizers, stages and alphas are the same bit for bit; data and outcomes are each rank's."""
    first, second = ({key: result[key] for key in ("model", "optimizer", "session")} for result in results)
    assert not differences(first, second)


@pytest.mark.parametrize("framework", ["lightning", "huggingface"])
def test_a_seed_grows_on_all_ranks_of_a_framework_alike(ranks, tmp_path, framework):
    pytest.importorskip({"lightning": "lightning", "huggingface": "transformers"}[framework])
    first, second = ranks.run(framework, tmp_path)
    assert first["stages"][0] == lifecycle.FOSSILIZED
    assert not differences(first, second)


def test_what_an_operator_does_on_the_first_rank_happens_on_all_and_none_ends_their_step(ranks, tmp_path):
    first, second = ranks.run("operator", tmp_path)
    assert first["said"].startswith("FailedPrecondition: Several ranks train this model")
    assert first["paused"] == second["paused"] == [False, True]
    assert_alike([first, second])


@pytest.mark.parametrize("scenario", ["life", "convolution", "controlled"])
def test_a_seed_grows_on_all_ranks_alike(ranks, tmp_path, scenario):
    first, second = ranks.run(scenario, tmp_path)
    assert first["results"] == [CommandOutcome.RESULT_APPLIED] * 8, first["reasons"]
    assert second["results"] == []
    assert lifecycle.FOSSILIZED in first["stages"]
    assert first["stages"] == second["stages"]
    assert_alike([first, second])
    assert torch.equal(first["exported"], second["exported"])


def test_a_training_goes_on_from_a_checkpoint_bit_for_bit_and_every_rank_must_restore_it(ranks, tmp_path):
    unbroken = ranks.run("unbroken", tmp_path / "unbroken")
    resumed = ranks.run("resumed", tmp_path / "resumed")
    assert_alike(resumed)
    for whole, again in zip(unbroken, resumed, strict=True):
        assert not differences({**whole, "results": [], "reasons": []}, again)
    said = [result["said"] for result in ranks.run("restored_on_one", tmp_path / "one")]
    assert all(each.startswith("OutOfStep: The ranks hold different seeds") for each in said), said


def test_all_ranks_go_back_by_a_command_each_to_its_own_copy(ranks, tmp_path):
    results = ranks.run("rolled_back", tmp_path)
    assert_alike(results)
    for result in results:
        assert result["blending"][1] == lifecycle.BLENDING
        assert result["back"] == 10
        assert not differences(result["once"], result["again"])
    assert results[0]["results"][-1] == CommandOutcome.RESULT_APPLIED, results[0]["reasons"]
    assert differences(*(result["once"]["numbers"] for result in results))


def test_all_ranks_go_back_to_the_disk_of_the_first_for_an_operator(ranks, tmp_path):
    results = ranks.run("operator_rolls_back", tmp_path)
    assert_alike(results)
    assert results[0]["tier"] == RollbackTier.ROLLBACK_TIER_FULL
    for result in results:
        assert not differences(result["kept"], result["again"])


def test_all_ranks_go_back_when_the_first_sees_an_emergency(ranks, tmp_path):
    results = ranks.run("emergency", tmp_path)
    assert_alike(results)
    for result in results:
        assert not differences(result["kept"], result["exploded"])
        # After an epoch it is done in the next step.
        assert result["later"]["steps"] == 11
        assert result["again"]["steps"] == 10


def test_all_ranks_stand_still_at_a_halt_and_go_on_together(ranks, tmp_path):
    results = ranks.run("halted", tmp_path)
    for result in results:
        # One update was done, and none began before the release.
        assert result["stood"] == [(True, 1), (False, 1)]
    assert results[0]["beats"] >= 3
    assert_alike(results)


def test_a_rank_that_dies_in_a_rollback_ends_the_others_amid_their_step(ranks, tmp_path):
    (first,) = ranks.run("dies_in_rollback", tmp_path, lost=(1,))
    assert first["said"].startswith("OutOfStep: The ranks of this training have come apart")
    # Nothing has gone back.
    assert first["steps"] == 1
    assert first["stages"][1] == lifecycle.BLENDING


def test_a_seed_that_fails_on_one_rank_is_culled_on_all(ranks, tmp_path):
    results = ranks.run("fails_on_second", tmp_path)
    assert {result["before"] for result in results} == {lifecycle.BLENDING}
    assert all(result["stages"][1] not in lifecycle.LIVE for result in results)
    assert_alike(results)


def test_a_seed_that_one_rank_cannot_build_is_culled_on_all(ranks, tmp_path):
    results = ranks.run("not_installed_on_second", tmp_path)
    assert all(result["planted"][1] == lifecycle.GERMINATED for result in results)
    assert all(result["stages"][1] not in lifecycle.LIVE for result in results)


def test_whatever_fails_on_the_first_rank_the_others_go_on(ranks, tmp_path):
    results = ranks.run("broken_on_first", tmp_path)
    # How long a seed was where it is counts only on a rank that counted.
    for result in results:
        for seed in result["session"]["host"]["seeds"].values():
            del seed["steps_in_stage"]
    assert_alike(results)
    assert results[0]["failures"] >= 2


def test_a_rank_that_dies_ends_the_others_by_an_error(ranks, tmp_path):
    (first,) = ranks.run("dies", tmp_path / "amid", lost=(1,))
    assert first["said"]
    assert first["steps"] in (5, 6)
    (first,) = ranks.run("dies_in_step", tmp_path / "step", lost=(1,))
    assert first["said"].startswith("OutOfStep: The ranks of this training have come apart")


def test_without_a_mesh_no_rank_is_attached(ranks, tmp_path):
    assert [result["kind"] for result in ranks.run("without_mesh", tmp_path)] == ["DetachedSession"] * SIZE


def test_every_rank_is_told_why_the_first_cannot_attach(ranks, tmp_path):
    first, second = (result["said"] for result in ranks.run("bad_address", tmp_path))
    assert first.startswith("ConfigError")
    assert second == f"ConfigError: The first rank could not attach: {first.removeprefix('ConfigError: ')}"


def test_ranks_that_train_a_model_each_have_a_session_each(ranks, tmp_path):
    assert [result["kind"] for result in ranks.run("alone", tmp_path)] == ["TrainingSession"] * SIZE


def test_a_real_mesh_steers_both_ranks_is_measured_and_leaves_them_alike_when_it_hangs(ranks, tmp_path):
    home = Home(tmp_path / "mesh")
    home.prepare()
    subprocess.run([*cli_command(), "urza", "seed", "--home", str(home.directory)], check=True, capture_output=True)
    directory = tmp_path / "ranks"
    with Supervisor(home, dict(os.environ)) as supervisor:
        # What they measure is not judged here.
        first, second = ranks.run("measured", tmp_path / "measured")
        assert first.keys() >= {"overhead_percent", "ahead_percent", "with_seeds_percent", "plain", "asking"}
        assert first["batch"] == second["batch"]
        assert (first["seeds"], second["seeds"], second["answers"]) == (4, 4, {})
        assert first["answers"]
        ranks.start("real", directory)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not all((directory / f"grown-{rank}").exists() for rank in range(SIZE)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        supervisor.services["tamiyo"].process.send_signal(19)
        try:
            (directory / "stopped").touch()
            results = ranks.end(directory)
        finally:
            supervisor.services["tamiyo"].process.send_signal(18)
    assert_alike(results)
    assert [result["steps"] for result in results] == [30, 30]
    assert CommandOutcome.RESULT_APPLIED in results[0]["results"]
    assert any(stage in lifecycle.LIVE for stage in results[0]["stages"])
    # The other rank talks to nobody, and serves nothing.
    assert results[1]["connections"] == 0
    assert results[1]["address"] == ""
