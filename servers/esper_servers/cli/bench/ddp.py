from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from multiprocessing.queues import SimpleQueue
from typing import Annotated, Any

import typer

from esper_rpc.errors import Unavailable
from esper_servers.cli.console import JsonOption, environ_of
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

from .measure import machine, rounds_for, scratch_home, show
from .overhead import LEAST_ROUNDS, SHARES, in_turns, row
from .served_plan import COMPILED, PlanOption, serving_plan
from .timed_training import Training, batch_for
from .urza import seed

LENGTHS_MS = [50]


def ddp(
    context: typer.Context,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="How long to measure each length.")] = 60.0,
    step_ms: Annotated[
        list[int], typer.Option("--step-ms", min=2, help="How long a step is; may be repeated.")
    ] = LENGTHS_MS,
    ranks: Annotated[int, typer.Option("--ranks", min=2, max=16, help="How many processes train the model.")] = 2,
    plan: PlanOption = COMPILED,
    as_json: JsonOption = False,
) -> None:
    """Measure what a whole mesh adds to steps of DistributedDataParallel, over gloo on this host.

    The kinds of blocks are those of `overhead`; all ranks train the same kind at once, and the first one is timed.
    """
    with scratch_home() as home:
        seed(home)
        with Supervisor(home, serving_plan(plan, home, environ_of(context))):
            rows = {f"{length}ms": measure(home, length, seconds, ranks) for length in step_ms}
    document = {
        **{share: {name: row[share] for name, row in rows.items()} for share in SHARES},
        "ranks": ranks,
        "steps": rows,
        "machine": machine(),
    }
    show("ddp", document, as_json=as_json)


def measure(home: Home, step_ms: float, seconds: float, ranks: int) -> dict[str, Any]:
    """Return the shares for steps of about this length on each rank; raises Unavailable when a rank fails."""
    context = multiprocessing.get_context("spawn")
    told: SimpleQueue[dict[str, Any]] = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, home, step_ms, seconds, told)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise Unavailable("A rank failed; what it wrote above says why.")
    return told.get()


def compare(home: Home, step_ms: float, rounds: Iterable[int]) -> dict[str, Any]:
    """Train the blocks as a rank of the present process group; returns what `measure` does, as it was on this rank.

    How many rounds there are is up to the first rank.
    """
    batch = int(_of_first(batch_for(step_ms)))
    plain, attached = Training.plain(batch).on_ranks(), Training.attached(batch, home).on_ranks()
    try:
        attached.connect(lambda is_connected: bool(_of_first(float(is_connected))))
        return row(attached, in_turns(plain, attached, _together(rounds)), batch)
    finally:
        attached.close()


def _rank(rank: int, ranks: int, home: Home, step_ms: float, seconds: float, told: SimpleQueue[dict[str, Any]]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{home.directory}/ranks-{step_ms}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    found = compare(home, step_ms, rounds_for(seconds, least=LEAST_ROUNDS))
    if rank == 0:
        told.put(found)
    dist.destroy_process_group()


def _together(rounds: Iterable[int]) -> Iterator[int]:
    turns = iter(rounds)
    turn = _of_first(next(turns, -1))
    while turn >= 0:
        yield int(turn)
        turn = _of_first(next(turns, -1))


def _of_first(value: float) -> float:
    import torch
    import torch.distributed as dist

    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return float(shared)
