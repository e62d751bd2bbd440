"""What a policy must show before it may decide. It is computed aside: none of it holds up a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from esper_rpc.journal import JournalReader
from esper_rpc.proto.leyline.v1 import SeedState, SystemStatePacket
from esper_servers.policy import checkpoint, sample
from esper_servers.policy.checkpoint import CheckpointRejected, Manifest
from esper_servers.policy.graph import GraphInputs, RunGraph
from esper_servers.policy.masks import LEGAL_OPERATIONS
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig, RunSignals
from esper_servers.policy.registries import mismatches

from .recent_decisions import decide_recent_again

VERSION_MISMATCH = "version_mismatch"
REGISTRY_MISMATCH = "registry_mismatch"
_STILL = RunSignals(steps=0, steps_since_germination=0, loss_trend=0.0, loss_volatility=0.0, steps_since_optimizer=0)


@dataclass(frozen=True, slots=True)
class Validated:
    """A policy that may go live."""

    manifest: Manifest
    compared: int
    """Recent decisions that it made again."""
    disagreed: int
    """Of these, how many it made otherwise than the policy of then."""


def validate(path: Path, version: str, registries: Mapping[str, str], prior: PriorConfig, journal: Path) -> Validated:
    """Check a policy by its file, on the golden graphs and on recent decisions; raises CheckpointRejected."""
    manifest = checkpoint.read_manifest(path)
    if manifest.version != version:
        raise CheckpointRejected(VERSION_MISMATCH, f"the file is {manifest.version!r}, the update {version!r}")
    _check_registries(manifest.registries, registries)
    policy = checkpoint.load(path, prior)
    check_golden(policy)
    compared, disagreed = decide_recent_again(policy, JournalReader(journal))
    return Validated(manifest, compared, disagreed)


def check_golden(policy: Policy) -> None:
    """Raise CheckpointRejected unless every output is finite: on the sample graph in each stage, and on the least."""
    blueprints = sample.sample_blueprints()
    graph = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), blueprints)
    for stage in LEGAL_OPERATIONS:
        states = sample.sample_states(stage)  # type: ignore[arg-type]  # A stage by number.
        packet = SystemStatePacket(training_metrics={"loss": 0.5, "gradient_norm": 1.0}, seed_states=states)
        _check_output(policy, graph.fill(packet), states)
    _check_output(policy, RunGraph({}, [], [], []).inputs, [])


def _check_output(policy: Policy, inputs: GraphInputs, states: Sequence[SeedState]) -> None:
    if not policy.evaluate(inputs, states, _STILL).is_finite:
        raise CheckpointRejected(checkpoint.NOT_FINITE, "its outputs on a golden graph")


def _check_registries(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """A policy that was trained with other numbers for the same names would read nonsense."""
    problems = mismatches(expected, {name: found[name] for name in expected if name in found})
    if problems:
        raise CheckpointRejected(REGISTRY_MISMATCH, " ".join(problems))
