from __future__ import annotations

import collections
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from esper_rpc.errors import (
    ConfigError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from esper_servers.tolaria.state import checkpoint_store, durable_files, tensor_file
from esper_servers.tolaria.state.checkpoint_store import CheckpointStore, Skipped, StoreConfig
from esper_servers.tolaria.state.durable_files import DurableFile, DurableFiles


def make_state(step=1):
    generator = torch.Generator().manual_seed(step)
    return {"model": {"weight": torch.randn(7, 3, generator=generator)}, "session": {"step": step}}


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    else:
        assert a == b or (math.isnan(a) and math.isnan(b))


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def store(directory):
    return CheckpointStore(directory)


def fill(store, *steps):
    return [store.save(make_state(step), epoch=step // 10, step=step).name for step in steps]


def test_a_checkpoint_comes_back_as_it_was(store):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(8, 5)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    odd = {
        "none": None, "nan": math.nan, "inf": -math.inf, "tenth": 0.1, "wide": 2**100, "raw": b"\0\xff", "yes": True,
        "nested": [(1, (2.5,)), []], 3: {(0, "a"): 1}, "$tensor": "no tensor", "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3), "bool": torch.tensor([True, False]), "half": torch.randn(3).to(torch.bfloat16),
        "strided": torch.randn(4, 6).t(), "spread": torch.randn(1, 3).expand(2, 3), "size": tuple(torch.Size([2])),
        "a.b": {"c": torch.ones(1)}, "a": {"b.c": torch.zeros(1)},
    }  # fmt: skip
    state = {
        "model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "odd": odd,
        "scheduler": scheduler.state_dict(), "plateau": plateau.state_dict(),
    }  # fmt: skip
    saved = store.save(state, epoch=2, step=40)
    loaded = store.load()
    assert (loaded.manifest, loaded.skipped) == (saved, ())
    assert (saved.epoch, saved.step, saved.torch_version) == (2, 40, torch.__version__)
    assert isinstance(loaded.state["scheduler"]["milestones"], collections.Counter)
    assert_same(loaded.state, state)


def test_the_files_are_safetensors_that_others_read(store, directory):
    state = make_state()
    name = store.save(state, epoch=0, step=1).name
    found = safetensors.torch.load_file(directory / name / "model-00001.safetensors")
    assert_same(found, {"model.weight": state["model"]["weight"]})


def test_tensors_go_to_files_of_a_limited_size_and_none_is_divided(directory):
    store = CheckpointStore(directory, StoreConfig(part_mb=1))
    tensors = {f"t{number}": torch.randn(150_000) for number in range(3)} | {"large": torch.randn(600_000)}
    manifest = store.save({"model": tensors}, epoch=0, step=1)
    sizes = [part.size_bytes for part in manifest.parts if part.file.startswith("model")]
    assert [size // 600_000 for size in sizes] == [1, 1, 1, 4]
    assert_same(store.load().state["model"], tensors)


def test_tensors_are_written_together_and_in_pieces_where_they_are_large(store, monkeypatch):
    monkeypatch.setattr(tensor_file, "WRITE_BYTES", 4096)
    tensors = {f"small{number}": torch.randn(100) for number in range(30)} | {"large": torch.randn(5000)}
    sizes, write = [], DurableFile.write
    monkeypatch.setattr(
        DurableFile, "write", lambda self, parts: (sizes.append(sum(map(len, parts))), write(self, parts))
    )
    store.save({"model": tensors}, epoch=0, step=1)
    assert max(sizes) < 2 * 4096
    assert len(sizes) < 32000 / 4096 + 4
    assert_same(store.load().state["model"], tensors)


def test_a_write_that_the_system_cuts_short_is_gone_on_with(directory, monkeypatch):
    writev = os.writev
    monkeypatch.setattr(durable_files.os, "writev", lambda file, parts: writev(file, [memoryview(b"".join(parts))[:7]]))
    store, state = CheckpointStore(directory), make_state()
    store.save(state, epoch=0, step=1)
    assert_same(store.load().state, state)


def test_so_many_are_kept_and_the_newest_is_loaded(directory):
    store = CheckpointStore(directory, StoreConfig(keep=2))
    names = fill(store, 10, 20, 30)
    assert store.names() == [names[2], names[1]]
    assert store.load().manifest.step == 30
    assert sorted(path.name for path in directory.iterdir()) == [".lock", names[1], names[2]]


def test_a_step_bounds_what_is_loaded(store):
    fill(store, 10, 20)
    assert store.load(latest_step=19).manifest.step == 10
    with pytest.raises(NotFound, match="There is no checkpoint"):
        store.load(latest_step=9)


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "checksum_mismatch": lambda found: flip(found / "model-00001.safetensors"),
    "size_mismatch": lambda found: os.truncate(found / "model-00001.safetensors", 20),
    "part_missing": lambda found: (found / "model-00001.safetensors").unlink(),
    "manifest_missing": lambda found: (found / "manifest.json").unlink(),
    "manifest_unreadable": lambda found: os.truncate(found / "manifest.json", 30),
    "manifest_damaged": lambda found: (found / "manifest.json").write_text(
        (found / "manifest.json").read_text().replace('"epoch": 2', '"epoch": 7')
    ),
    "unknown_format": lambda found: (found / "manifest.json").write_text(
        (found / "manifest.json").read_text().replace('"format": 1', '"format": 2')
    ),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_one_that_is_damaged_is_skipped_with_a_reason_for_the_one_before(store, directory, reason):
    names = fill(store, 10, 20)
    DAMAGE[reason](directory / names[1])
    loaded = store.load()
    assert (loaded.manifest.step, loaded.skipped) == (10, (Skipped(names[1], reason),))
    assert_same(loaded.state, make_state(10))


def test_a_damaged_structure_is_seen_too(store, directory):
    names = fill(store, 10, 20)
    flip(directory / names[1] / "structure.json")
    assert store.load().skipped == (Skipped(names[1], "checksum_mismatch"),)


def test_when_none_can_be_used_the_error_names_each_and_why(store, directory):
    names = fill(store, 10, 20)
    DAMAGE["part_missing"](directory / names[0])
    DAMAGE["checksum_mismatch"](directory / names[1])
    with pytest.raises(NotFound) as caught:
        store.load()
    assert f"{names[1]} (checksum_mismatch), {names[0]} (part_missing)" in caught.value.message


def test_what_is_damaged_does_not_push_out_what_is_whole(directory):
    store = CheckpointStore(directory, StoreConfig(keep=2))
    names = fill(store, 10, 20)
    DAMAGE["size_mismatch"](directory / names[1])
    names += fill(store, 30)
    assert store.names() == names[::-1]
    assert fill(store, 40, 50)[1] == store.names()[0]
    assert [int(name[-2:]) for name in store.names()] == [50, 40]


def test_a_state_may_be_refused_for_an_older_one(store):
    names = fill(store, 10, 20)
    loaded = store.load(accept=lambda state: "not_finite" if state["session"]["step"] == 20 else "")
    assert (loaded.manifest.step, loaded.skipped) == (10, (Skipped(names[1], "not_finite"),))


def test_a_reader_may_stop_the_reading(store):
    fill(store, 10)

    def stop():
        raise DeadlineExceeded("The time is over.")

    with pytest.raises(DeadlineExceeded):
        store.load(on_chunk=stop)


def test_what_a_rollback_went_back_behind_is_kept_aside_and_not_loaded(directory):
    store = CheckpointStore(directory, StoreConfig(keep=2))
    names = fill(store, 10, 20)
    assert store.abandon_after(10) == [names[1]]
    assert store.load().manifest.step == 10
    # Its manifest has the name that it was written under.
    assert_same(store.read(f"{names[1]}.abandoned")[1], make_state(20))
    later = fill(store, 15)
    assert later[0] > names[1]
    assert [path.name for path in sorted(directory.glob("0*"))] == [names[0], f"{names[1]}.abandoned", later[0]]
    fill(store, 16, 17, 18)
    store.abandon_after(14)
    assert len(list(directory.glob("*.abandoned"))) == 2 + 1


def test_a_name_from_elsewhere_is_no_path(store):
    with pytest.raises(ValueError, match="not_a_checkpoint"):
        store.read("../checkpoints")


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"scheduler": {"best": object()}}, "scheduler.best is a object"),
        ({"loader": {"sparse": torch.eye(2).to_sparse()}}, "loader.sparse is a torch.sparse_coo tensor"),
        ({"../x": {}}, "cannot name a state"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named_and_nothing_is_written(store, directory, state, told):
    with pytest.raises(InvalidRequest, match=told):
        store.save(state, epoch=0, step=1)
    assert store.names() == []
    assert [path for path in directory.iterdir() if path.name != ".lock"] == []


class FailingFile(DurableFile):
    def __init__(self, path, files):
        super().__init__(path)
        self.files = files

    def write(self, contents):
        self.files.work()
        super().write(contents)

    def close(self):
        super().close()
        self.files.work()


class FailingFiles(DurableFiles):
    def __init__(self, error):
        self.error, self.left = error, 10**9

    def work(self):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def make_directory(self, path):
        self.work()
        super().make_directory(path)

    def create(self, path):
        self.work()
        return FailingFile(path, self)


@pytest.mark.parametrize("left", range(10))
def test_a_full_disk_is_told_and_leaves_what_was_there(directory, left):
    files = FailingFiles(OSError(errno.ENOSPC, "No space left on device"))
    store = CheckpointStore(directory, files=files)
    names = fill(store, 10, 20)
    files.left = left
    with pytest.raises(ResourceExhausted, match="No space left on device") as told:
        store.save(make_state(30), epoch=0, step=30)
    assert told.value.reason == "STORAGE"
    assert "Earlier checkpoints are as they were" in told.value.message
    assert sorted(path.name for path in directory.iterdir()) == [".lock", *names]
    assert_same(store.load().state, make_state(20))
    files.left = 10**9
    assert fill(store, 30) == store.names()[:1]


def test_a_disk_that_fails_otherwise_is_unavailable(directory):
    files = FailingFiles(OSError(errno.EIO, "Input/output error"))
    store = CheckpointStore(directory, files=files)
    files.left = 3
    with pytest.raises(Unavailable, match="Input/output error"):
        fill(store, 10)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        CheckpointStore(tmp_path / "file" / "checkpoints")


def test_a_directory_that_was_removed_holds_nothing_and_is_made_again_by_the_next_save(store, directory):
    fill(store, 1)
    shutil.rmtree(directory)
    assert (store.names(), store.manifests()) == ([], [])
    with pytest.raises(NotFound, match="There is no checkpoint"):
        store.load()
    fill(store, 2)
    assert store.load().manifest.step == 2


def test_threads_write_one_after_the_other(store):
    threads = [threading.Thread(target=fill, args=(store, step)) for step in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.names()) == 3
    assert all(store.read(name) for name in store.names())


def test_another_process_that_writes_here_is_refused(store, directory):
    script = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True)"
    command = [sys.executable, "-c", script + "; sys.stdin.read()", str(directory / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(FailedPrecondition, match="Another process writes"):
            fill(store, 10)
        other.stdin.close()
    assert fill(store, 10)


def test_where_writes_cannot_be_synchronous_each_file_is_synced_before_it_is_named(directory, monkeypatch):
    synced, opened = [], os.open

    def refusing(path, flags, *rest):
        if flags & os.O_DSYNC:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest)

    def record(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    store = CheckpointStore(directory)
    monkeypatch.setattr(durable_files.os, "open", refusing)
    monkeypatch.setattr(durable_files.os, "fsync", record)
    name = fill(store, 10)[0]
    assert synced == ["model-00001.safetensors", "structure.json", "manifest.json", f".partial-{name}", "checkpoints"]
    assert_same(store.load().state, make_state(10))


def test_every_write_is_on_the_disk_when_it_returns(store, monkeypatch):
    flags, opened = {}, os.open

    def record(path, wanted, *rest):
        flags[Path(path).name] = wanted
        return opened(path, wanted, *rest)

    monkeypatch.setattr(checkpoint_store.os, "open", record)
    fill(store, 10)
    written = [name for name in flags if name.endswith((".json", ".safetensors"))]
    assert len(written) == 3
    assert all(flags[name] & os.O_DSYNC for name in written)


def test_after_a_kill_at_any_call_the_last_good_checkpoint_loads_bit_equal(tmp_path):
    script = Path(__file__).with_name("killed_writers.py")
    ran = subprocess.run([sys.executable, script, tmp_path / "c"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert len(told["points"]) >= 20
    assert all(point["killed"] and point["equal"] for point in told["points"])
    assert all(point["loaded"] in (point["good"], point["step"]) for point in told["points"])
    # It was lost where the kill came before its name, and kept after.
    assert {point["loaded"] == point["step"] for point in told["points"]} == {True, False}
    assert [name for name in told["left"] if name.startswith(".partial")] == []
    assert len(told["left"]) == 3
