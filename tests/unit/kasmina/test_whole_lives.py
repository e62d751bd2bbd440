"""From germination to a fossil by commands and gates: in three kinds of models, compiled, and under autocast."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from esper_servers.kasmina import lifecycle


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def transformer():
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)]
    return nn.Sequential(nn.Embedding(11, 8), *layers, nn.Flatten(), nn.Linear(7 * 8, 5))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


MODELS = {
    "cnn": (cnn, ("0", "3"), "depthwise_conv", lambda g: torch.randn(8, 3, 6, 6, generator=g)),
    "transformer": (transformer, ("1", "2"), "attention_adapter", lambda g: torch.randint(0, 11, (8, 7), generator=g)),
    "mlp": (mlp, ("0", "2"), "residual_mlp", lambda g: torch.randn(8, 6, generator=g)),
}


@pytest.fixture
def make(make_rig):
    def of(kind):
        build, site_names, blueprint, draw = MODELS[kind]
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        batch = draw(generator), torch.randint(0, 5, (8,), generator=generator)
        rig = make_rig(model=build(), site_names=site_names, batch=batch)
        rig.optimizer.param_groups[0]["lr"] = 0.01
        return rig, blueprint

    return of


def under_autocast(run):
    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(x).float()

    return forward


# Dynamo looks at .grad of every graph input.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_seed_lives_from_germination_to_a_fossil(make, kind, is_compiled, precision):
    rig, blueprint = make(kind)
    if is_compiled:
        torch._dynamo.reset()
        # What is generated of a graph is torch's; what is captured, and captured anew, is what sites decide on.
        rig.run = torch.compile(rig.model, backend="eager")
    if precision == "bfloat16":
        rig.run = under_autocast(rig.run)
    rig.train()
    before = [p.clone() for p in rig.model.parameters()]
    rig.grow(lifecycle.FOSSILIZED, blueprint)
    rig.train(2)
    assert rig.slot.stage == lifecycle.FOSSILIZED
    assert not rig.slot.site.failure
    assert any(not torch.equal(a, b) for a, b in zip(before, rig.model.parameters(), strict=True))
    rig.model.eval()
    exported = rig.host.export().eval()
    with torch.no_grad():
        assert math.isfinite(float(nn.functional.cross_entropy(rig.run(rig.x), rig.y)))
        torch.testing.assert_close(exported(rig.x), rig.model(rig.x), rtol=1e-6, atol=1e-6)
        plain = rig.plain.eval()
        plain.load_state_dict(rig.model.state_dict())
        assert not torch.equal(plain(rig.x), rig.model(rig.x))
