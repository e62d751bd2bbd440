"""Type-checked, not run: the SDK as a user writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esper_client import BlockingTamiyoClient, BlockingUrzaClient, RemoteSeedHost, SeedHost, TrainingSession
from esper_rpc.identity import Identity
from esper_rpc.proto.tamiyo.v1 import GetPolicyRequest, GetPolicyResponse
from esper_rpc.proto.urza.v1 import WatchCatalogRequest


def ask_for_the_policy(address: str, directory: Path) -> str:
    identity = Identity.load(directory)
    with BlockingTamiyoClient(address, identity=identity) as tamiyo:
        policy: GetPolicyResponse = tamiyo.get_policy(GetPolicyRequest(), timeout=1.0)
    return policy.policy_version


def watch_the_library(urza: BlockingUrzaClient) -> Iterator[str]:
    for event in urza.watch_catalog(WatchCatalogRequest()):
        yield event.update.blueprint_id


def train(session: TrainingSession, losses: list[float]) -> int:
    with session as mesh:
        return sum(len(mesh.step(loss, samples=32)) for loss in losses)


def train_elsewhere(kasmina: str, tamiyo: str, directory: Path) -> TrainingSession:
    identity = Identity.load(directory)
    host: SeedHost = RemoteSeedHost(kasmina, identity=identity)
    return TrainingSession(host=host, identity=identity, tamiyo_address=tamiyo)
