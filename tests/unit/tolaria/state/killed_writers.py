"""Checkpoints written by processes that are killed with SIGKILL, each at another call; prints what could be loaded."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from esper_servers.tolaria.state.checkpoint_store import CheckpointStore, StoreConfig
from esper_servers.tolaria.state.durable_files import DurableFile, DurableFiles


def state_of(step):
    generator = torch.Generator().manual_seed(step)
    moments = {
        index: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(3, 5, generator=generator)}
        for index in range(2)
    }
    return {
        "model": {"weight": torch.randn(40, 5, generator=generator), "bias": torch.randn(5, generator=generator)},
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1 / step, "betas": (0.9, 0.999)}]},
        "random": {"torch": torch.full((7,), step % 251, dtype=torch.uint8)},
    }


class DyingFile(DurableFile):
    def __init__(self, path, files):
        super().__init__(path)
        self.files = files

    def write(self, contents):
        if self.files.is_last():
            whole = memoryview(b"".join(contents))
            super().write([whole[: len(whole) // 2]])
            die()
        super().write(contents)

    def close(self):
        self.files.live()
        super().close()


class DyingFiles(DurableFiles):
    """Ends the process at the call with this number; a write is then half done."""

    def __init__(self, last):
        self.last, self.calls = last, 0

    def is_last(self):
        self.calls += 1
        return self.calls == self.last

    def live(self):
        if self.is_last():
            die()

    def make_directory(self, path):
        self.live()
        super().make_directory(path)

    def create(self, path):
        self.live()
        return DyingFile(path, self)

    def rename(self, before, after):
        self.live()
        super().rename(before, after)

    def sync_directory(self, path):
        self.live()
        super().sync_directory(path)

    def remove(self, path):
        self.live()
        super().remove(path)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def is_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def save(directory, step, last):
    files = DyingFiles(last)
    CheckpointStore(directory, StoreConfig(keep=2), files=files).save(state_of(step), epoch=0, step=step)
    return files.calls


def main(directory):
    save(directory, 1, 0)
    save(directory, 2, 0)
    calls, good, points = save(directory, 3, 0), 3, []
    for last in range(1, calls + 1):
        step = 3 + last
        child = os.fork()
        if child == 0:
            save(directory, step, last)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        loaded = CheckpointStore(directory).load()
        points.append({
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "loaded": loaded.manifest.step, "good": good, "step": step,
            "equal": is_equal(loaded.state, state_of(loaded.manifest.step)),
        })  # fmt: skip
        good = loaded.manifest.step
    save(directory, 1000, 0)
    print(json.dumps({"points": points, "left": sorted(path.name for path in directory.iterdir())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
