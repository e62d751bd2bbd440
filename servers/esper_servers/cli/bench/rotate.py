from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any

import typer

from esper_client import TamiyoClient, UrzaClient
from esper_client.discovery import find_mesh
from esper_client.renewal import CHECK_SECONDS, CertificateRenewer
from esper_rpc.envelope import Keyring, RootKeys
from esper_rpc.errors import EsperError
from esper_rpc.identity import SpiffeId
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, OpenRunRequest
from esper_rpc.proto.urza.v1 import ListBlueprintsRequest
from esper_servers.cli.console import JsonOption, environ_of, run
from esper_servers.cli.home import INSTANCE, MEMBERS, Home
from esper_servers.cli.plan import without_plan
from esper_servers.cli.processes import Supervisor

from .measure import machine, percentiles, scratch_home, show
from .scene import BenchHost
from .step import unary_step
from .urza import seed

LEAF_SECONDS = 12
FIRST_LEAF_SECONDS = 30
SETTLE_SECONDS = 3.0
RUNS = 100
"""So many that two calls of one run never overlap: their order would matter."""


@dataclass(slots=True)
class Tally:
    """What became of the calls."""

    calls: int = 0
    failed: list[str] = field(default_factory=list)
    answered_at: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    certificates: int = 0
    keys: int = 0


def rotate(
    context: typer.Context,
    certificates: Annotated[int, typer.Option(min=1, help="How often the caller's certificate is renewed.")] = 10,
    keys: Annotated[int, typer.Option(min=0, help="How often the signing keys rotate meanwhile.")] = 5,
    rate: Annotated[int, typer.Option(min=1, help="Calls a second.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Renew certificates and rotate keys under load, and count the calls that fail.

    Half of the calls ask Tamiyo and verify its signature, half read from Urza. Leaves live 12 s, so that every process
    renews its own again and again.
    """
    with scratch_home() as home:
        seed(home)
        home.settings_file.write_text(f"[pki]\nleaf_seconds = {LEAF_SECONDS}\n")
        for role in MEMBERS:
            home.issue_identity(SpiffeId(role, INSTANCE), lifetime=timedelta(seconds=FIRST_LEAF_SECONDS))
        with Supervisor(home, without_plan(environ_of(context))):
            tally = run(_measure(home, certificates, keys, rate))
    gaps = [later - earlier for earlier, later in zip(tally.answered_at, tally.answered_at[1:], strict=False)]
    document = {
        "failed_calls": len(tally.failed),
        "longest_gap_ms": round(max(gaps) * 1e3, 1),
        "calls": tally.calls,
        "certificate_rotations": tally.certificates,
        "key_rotations": tally.keys,
        "call": percentiles(tally.latencies_ms),
        "failures": sorted(set(tally.failed))[:5],
    }
    show("rotate", document | {"machine": machine()}, as_json=as_json)


async def _measure(home: Home, certificates: int, keys: int, rate: int) -> Tally:
    mesh = find_mesh({"ESPER_HOME": str(home.directory)})
    assert mesh is not None
    identity, host, tally = home.identity("trainer"), BenchHost(home), Tally()
    async with (
        TamiyoClient(mesh.tamiyo, identity=identity) as tamiyo,
        UrzaClient(mesh.urza, identity=identity) as urza,
    ):
        for number in range(RUNS):
            await tamiyo.open_run(_opening(host, number))
        beside = [
            asyncio.create_task(_renew(CertificateRenewer(identity, address=mesh.weatherlight), host.keyring)),
            asyncio.create_task(_rotate_keys(home, keys, tally)),
            asyncio.create_task(_count_renewals(home, tally)),
        ]
        pending: set[asyncio.Task[None]] = set()
        settled: dict[str, list[CommandOutcome]] = {}
        beat, sequence = time.perf_counter(), 0
        while tally.certificates < certificates or tally.keys < keys:
            sequence += 1
            call = _ask_tamiyo(tamiyo, host, sequence, settled) if sequence % 2 else _ask_urza(urza)
            task = asyncio.create_task(_timed(call, tally))
            pending.add(task)
            task.add_done_callback(pending.discard)
            beat += 1 / rate
            await asyncio.sleep(max(0.0, beat - time.perf_counter()))
        await asyncio.gather(*pending)
        for task in beside:
            task.cancel()
    return tally


async def _timed(call: Any, tally: Tally) -> None:
    tally.calls += 1
    begun = time.perf_counter()
    try:
        await call
    except EsperError as error:
        tally.failed.append(f"{type(error).__name__}: {error.message}"[:200])
        return
    tally.answered_at.append(time.perf_counter())
    tally.latencies_ms.append((time.perf_counter() - begun) * 1e3)


async def _ask_tamiyo(
    client: TamiyoClient, host: BenchHost, sequence: int, settled: dict[str, list[CommandOutcome]]
) -> None:
    run_id = _run_id(sequence // 2)
    request = EvaluateStepRequest(step=unary_step(host, sequence, settled.pop(run_id, []), run_id=run_id))
    decision = (await client.evaluate_step(request)).decision
    if decision.HasField("command"):
        outcome = host.submit(decision.command)
        settled[run_id] = [outcome, *host.apply_pending()]
        # Calls overlap here, so that an answer may come after a later one; every other refusal is a failure.
        if outcome.result == CommandOutcome.RESULT_REJECTED and outcome.reason != "sequence_replayed":
            raise EsperError(f"the command was refused: {outcome.reason}")


async def _ask_urza(client: UrzaClient) -> None:
    await client.list_blueprints(ListBlueprintsRequest())


async def _renew(renewer: CertificateRenewer, keyring: Keyring) -> None:
    while True:
        await renewer.check()
        await keyring.refresh()
        await asyncio.sleep(CHECK_SECONDS)


async def _count_renewals(home: Home, tally: Tally) -> None:
    seen = home.identity("trainer").chain_pem
    while True:
        await asyncio.sleep(0.1)
        with contextlib.suppress(EsperError):
            current = home.identity("trainer").chain_pem
            tally.certificates += current != seen
            seen = current


async def _rotate_keys(home: Home, times: int, tally: Tally) -> None:
    """As `esper keys rotate` does, without blocking the loop."""
    for _ in range(times):
        roots = RootKeys.load(home.root_keys)
        for old in [key_id for key_id in roots.roots if key_id != roots.active_key_id]:
            roots = roots.without(old)
        for changed in (roots.with_new_root(), None):
            roots = changed or roots.with_active(roots.newest_key_id)
            roots.save(home.root_keys)
            await asyncio.to_thread(home.reissue_keyrings)
            await asyncio.sleep(SETTLE_SECONDS)
        tally.keys += 1


def _run_id(number: int) -> str:
    return f"bench-rotate-{number % RUNS}"


def _opening(host: BenchHost, number: int) -> OpenRunRequest:
    described = host.describe()
    return OpenRunRequest(
        run_id=_run_id(number), protocol_versions=[2], features=["seed", "pause", "optimizer"],
        receiver_epoch=host.receiver_epoch, host_topology=described.host_topology, sites=described.sites,
        seeds=described.seeds, world_size=1,
    )  # fmt: skip
