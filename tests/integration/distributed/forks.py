"""Ranks of a distributed training as forks of a process that has imported everything: that takes longer than they do.

Reads lines of a scenario and a directory; for each it forks the ranks, waits for them and writes their exit codes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import esper_client  # noqa: F401  # Before torch: it sets how OpenMP's threads wait.

import torch  # isort: skip
import framework_rank
import rank as scenarios
import torch.distributed as dist
import torch.distributed.tensor

from esper_servers.blueprints.catalogue import load_factories
from esper_servers.trainer import attaching  # noqa: F401  # For the forks.

SIZE = 2
LONGEST_SECONDS = 300


def serve():
    """Run what each line asks for."""
    torch.set_num_threads(1)
    _import_what_torch_puts_off()
    print(json.dumps([]), flush=True)
    for line in sys.stdin:
        scenario, directory = line.split()
        for module in framework_rank.MODULES.get(scenario, ()):
            importlib.import_module(module)
        children = [_fork(scenario, rank, Path(directory)) for rank in range(SIZE)]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]), flush=True)


def _import_what_torch_puts_off():
    torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    load_factories()


def _fork(scenario, rank, directory):
    child = os.fork()
    if child:
        return child
    # Where the test was killed nobody else ends it.
    signal.alarm(LONGEST_SECONDS)
    code = 1
    try:
        said = os.open(directory / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        with contextlib.chdir(directory):
            _train(scenario, rank, directory)
        code = 0
    except BaseException:  # noqa: BLE001  # What it is stands in the file.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(scenario, rank, directory):
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    if scenario in framework_rank.MODULES:
        framework_rank.train(scenario, rank, directory, SIZE)
    else:
        getattr(scenarios, scenario)(rank, directory)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    serve()
