"""Two ranks of DistributedDataParallel under one mesh: processes of their own, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor, cli_command
from esper_servers.kasmina import lifecycle

SCRIPT = Path(__file__).with_name("rank.py")
SIZE = 2
PATIENCE_SECONDS = 150.0

pytestmark = pytest.mark.timeout(300)


def start(scenario, directory, **environ):
    directory.mkdir(exist_ok=True, parents=True)
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), scenario, str(directory), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environ}, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(SIZE)
    ]  # fmt: skip


def end(processes, directory, lost=()):
    try:
        said = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert rank in lost or process.returncode == 0, said[rank][1][-3000:]
    files = [directory / f"rank-{rank}.pt" for rank in range(SIZE)]
    return [torch.load(file, weights_only=False) for file in files if file.exists()]


def run(scenario, directory, **options):
    return end(start(scenario, directory), directory, **options)


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
def test_a_seed_grows_on_all_ranks_of_a_framework_alike(tmp_path, framework):
    pytest.importorskip({"lightning": "lightning", "huggingface": "transformers"}[framework])
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*torchrun, str(SCRIPT.with_name("framework_rank.py")), framework, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(SIZE))
    assert first["stages"][0] == lifecycle.FOSSILIZED
    assert not differences(first, second)


def test_what_an_operator_does_on_the_first_rank_happens_on_all_and_none_ends_their_step(tmp_path):
    first, second = run("operator", tmp_path)
    assert first["said"].startswith("FailedPrecondition: Several ranks train this model")
    assert_alike([first, second])


@pytest.mark.parametrize("scenario", ["life", "convolution"])
def test_a_seed_grows_on_all_ranks_alike(tmp_path, scenario):
    first, second = run(scenario, tmp_path)
    assert first["results"] == [CommandOutcome.RESULT_APPLIED] * 8, first["reasons"]
    assert second["results"] == []
    assert lifecycle.FOSSILIZED in first["stages"]
    assert first["stages"] == second["stages"]
    assert_alike([first, second])
    assert torch.equal(first["exported"], second["exported"])


def test_a_training_goes_on_from_a_checkpoint_bit_for_bit_and_every_rank_must_restore_it(tmp_path):
    unbroken = run("unbroken", tmp_path / "unbroken")
    resumed = run("resumed", tmp_path / "resumed")
    assert_alike(resumed)
    for whole, again in zip(unbroken, resumed, strict=True):
        assert not differences({**whole, "results": [], "reasons": []}, again)
    said = [result["said"] for result in run("restored_on_one", tmp_path / "one")]
    assert all(each.startswith("OutOfStep: The ranks hold different seeds") for each in said), said


def test_a_seed_that_fails_on_one_rank_is_culled_on_all(tmp_path):
    results = run("fails_on_second", tmp_path)
    assert {result["before"] for result in results} == {lifecycle.BLENDING}
    assert all(result["stages"][1] not in lifecycle.LIVE for result in results)
    assert_alike(results)


def test_a_seed_that_one_rank_cannot_build_is_culled_on_all(tmp_path):
    results = run("not_installed_on_second", tmp_path)
    assert all(result["planted"][1] == lifecycle.GERMINATED for result in results)
    assert all(result["stages"][1] not in lifecycle.LIVE for result in results)


def test_whatever_fails_on_the_first_rank_the_others_go_on(tmp_path):
    results = run("broken_on_first", tmp_path)
    # How long a seed was where it is counts only on a rank that counted.
    for result in results:
        for seed in result["session"]["host"]["seeds"].values():
            del seed["steps_in_stage"]
    assert_alike(results)
    assert results[0]["failures"] >= 2


def test_a_rank_that_dies_ends_the_others_by_an_error(tmp_path):
    (first,) = run("dies", tmp_path / "amid", lost=(1,))
    assert first["said"]
    assert first["steps"] in (5, 6)
    (first,) = run("dies_in_step", tmp_path / "step", lost=(1,))
    assert first["said"].startswith("OutOfStep: The ranks of this training have come apart")


def test_without_a_mesh_no_rank_is_attached(tmp_path):
    assert [result["kind"] for result in run("without_mesh", tmp_path)] == ["DetachedSession"] * SIZE


def test_every_rank_is_told_why_the_first_cannot_attach(tmp_path):
    first, second = (result["said"] for result in run("bad_address", tmp_path))
    assert first.startswith("ConfigError")
    assert second == f"ConfigError: The first rank could not attach: {first.removeprefix('ConfigError: ')}"


def test_ranks_that_train_a_model_each_have_a_session_each(tmp_path):
    assert [result["kind"] for result in run("alone", tmp_path)] == ["TrainingSession"] * SIZE


def test_a_real_mesh_steers_both_ranks_and_leaves_them_alike_when_it_hangs(tmp_path):
    home = Home(tmp_path / "mesh")
    home.prepare()
    subprocess.run([*cli_command(), "urza", "seed", "--home", str(home.directory)], check=True, capture_output=True)
    directory = tmp_path / "ranks"
    with Supervisor(home, dict(os.environ)) as supervisor:
        processes = start("real", directory, MESH_HOME=str(home.directory))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not all((directory / f"grown-{rank}").exists() for rank in range(SIZE)):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
            time.sleep(0.01)
        supervisor.services["tamiyo"].process.send_signal(19)
        try:
            (directory / "stopped").touch()
            results = end(processes, directory)
        finally:
            supervisor.services["tamiyo"].process.send_signal(18)
    assert_alike(results)
    assert [result["steps"] for result in results] == [30, 30]
    assert CommandOutcome.RESULT_APPLIED in results[0]["results"]
    assert any(stage in lifecycle.LIVE for stage in results[0]["stages"])
    # The other rank talks to nobody, and serves nothing.
    assert results[1]["connections"] == 0
    assert results[1]["address"] == ""
