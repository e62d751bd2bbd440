"""Type-checked, not run: the SDK as a user writes it."""

from __future__ import annotations

from pathlib import Path

from esper_client import Blocking, RemoteSeedHost, SeedHost, TamiyoClient, TrainingSession
from esper_rpc.identity import Identity
from esper_rpc.proto.tamiyo.v1 import GetPolicyRequest, GetPolicyResponse


def ask_for_the_policy(address: str, directory: Path) -> str:
    identity = Identity.load(directory)
    with Blocking(lambda: TamiyoClient(address, identity=identity)) as tamiyo:
        policy: GetPolicyResponse = tamiyo.call(lambda client: client.get_policy(GetPolicyRequest()))
    return policy.policy_version


def train(session: TrainingSession, losses: list[float]) -> int:
    with session as mesh:
        return sum(len(mesh.step(loss, samples=32)) for loss in losses)


def train_elsewhere(kasmina: str, tamiyo: str, directory: Path) -> TrainingSession:
    identity = Identity.load(directory)
    host: SeedHost = RemoteSeedHost(kasmina, identity=identity)
    return TrainingSession(host=host, identity=identity, tamiyo_address=tamiyo)
