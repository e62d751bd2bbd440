"""A graph of the size that benchmarks and tests use: 24 layers, 8 activations, 16 parameters, 4 seeds, blueprints."""

from __future__ import annotations

from typing import Any

from esper_rpc.proto.leyline.v1 import BlueprintDescriptor, BlueprintTier, SeedLifecycleStage, SeedState
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite

from .graph import BlueprintCandidate

LAYERS, ACTIVATIONS, PARAMETERS, SEEDS = 24, 8, 16, 4
FEATURES = 32


def sample_topology() -> dict[str, Any]:
    """A host in the extras schema, with every optional field."""
    return {
        "schema_version": "v1",
        "layers": [
            {"layer_id": f"layers.{i}", "type": "Linear", "depth": i, "parameter_count": 1000 * (i + 1),
             "weight_norm": 3.0 + i, "gradient_norm": 0.1, "dropout_rate": 0.1, "latency_ms": 0.2}
            for i in range(LAYERS)
        ],
        "activations": [
            {"activation_id": f"a{i}", "type": "GELU", "saturation_rate": 0.1, "gradient_flow": 0.9,
             "computational_cost": 0.2}
            for i in range(ACTIVATIONS)
        ],
        "parameters": [
            {"name": f"p{i}", "min": 0.0, "max": 1.0, "span": 1.0, "default": 0.5} for i in range(PARAMETERS)
        ],
        "adjacency": {"layer": [[i, i + 1, 0.5 + i / LAYERS] for i in range(LAYERS - 1)]},
        "monitored_layers": [[i, 5 * i + 2, 1.0] for i in range(SEEDS)],
        "capabilities": {"by_seed_index": {"0": ["linear"], "1": ["cosine", "sigmoid"]}},
    }  # fmt: skip


def sample_sites() -> list[RunSite]:
    """Four sites in the host."""
    return [
        RunSite(site_id=f"layers.{5 * i + 2}", module_kind="Linear", output_shape=[FEATURES], dtype="F32")
        for i in range(SEEDS)
    ]


def sample_seeds() -> list[RunSeed]:
    """A seed at each site."""
    stage = SeedLifecycleStage.SEED_LIFECYCLE_STAGE_DORMANT
    return [RunSeed(seed_id=f"seed-{i}", site_id=site.site_id, stage=stage) for i, site in enumerate(sample_sites())]


def sample_states(stage: SeedLifecycleStage.ValueType) -> list[SeedState]:
    """The seeds as a host exports them."""
    metrics = {"alpha": 0.0, "alpha_steps": 0.0, "alpha_total_steps": 20.0, "risk_tolerance": 0.5,
               "blend_allowed": 1.0, "steps_in_stage": 3.0}  # fmt: skip
    return [
        SeedState(seed_id=s.seed_id, stage=stage, gradient_norm=0.3, learning_rate=1e-3, layer_depth=5 * i,
                  metrics=metrics, age_epochs=1, risk_score=0.1)
        for i, s in enumerate(sample_seeds())
    ]  # fmt: skip


def sample_blueprints() -> list[BlueprintCandidate]:
    """Two that fit every site; the first may be planted."""
    tiers = (BlueprintTier.BLUEPRINT_TIER_SAFE, BlueprintTier.BLUEPRINT_TIER_EXPERIMENTAL)
    sites = frozenset(site.site_id for site in sample_sites())
    return [
        BlueprintCandidate(
            blueprint_id=f"b{tier}",
            descriptor=BlueprintDescriptor(blueprint_id=f"b{tier}", name=f"b{tier}", tier=tier, risk=0.1),
            fits=sites,
        )
        for tier in tiers
    ]
