from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from esper_client import MeshAddress
from esper_rpc.errors import ConfigError
from esper_rpc.testing import TemporaryMesh
from esper_servers import trainer


def model():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.MultiheadAttention(4, 1), nn.Linear(4, 2)
    )


def test_hidden_layers_become_sites_and_the_last_and_the_opaque_do_not():
    assert trainer.choose_sites(model()) == ["0", "3"]


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compiled", "data parallel"]
)
def test_a_model_that_is_wrapped_already_is_refused_by_name(wrap):
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        trainer.wrap_sites(wrap(model()), ["0"])


def test_a_model_that_was_compiled_in_place_is_refused():
    compiled = model()
    compiled.compile(backend="eager")
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        trainer.wrap_sites(compiled, ["0"])


def test_an_unknown_site_is_named():
    with pytest.raises(ConfigError, match="'nowhere'"):
        trainer.wrap_sites(model(), ["nowhere"])


def test_a_model_is_attached_once():
    attached = model()
    trainer.wrap_sites(attached, ["0"])
    with pytest.raises(ConfigError, match="attached already"):
        trainer.wrap_sites(attached, ["3"])


def test_a_model_cannot_be_served_without_a_mesh(tmp_path):
    net = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match="No mesh found"):
        trainer.serve(net, torch.optim.SGD(net.parameters(), lr=0.1), environ={"ESPER_HOME": str(tmp_path)})


def test_without_a_mesh_there_is_one_warning_and_every_call_of_a_session(tmp_path):
    net = nn.Linear(2, 1)
    with pytest.warns(UserWarning, match="No mesh found"):
        session = trainer.attach(
            net, torch.optim.SGD(net.parameters(), lr=0.1), run_id="mine", environ={"ESPER_HOME": str(tmp_path)}
        )
    with session as mesh:
        assert mesh.step(1.0) == []
        mesh.load_state_dict(mesh.state_dict())
        assert (mesh.run_id, mesh.global_step, mesh.halted, mesh.hold()) == ("mine", 1, False, True)
        assert torch.equal(mesh.export().weight, net.weight)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"model": lambda x: x}, r"model must be a torch.nn.Module, not a function"),
        ({"optimizer": None}, "optimizer must be a torch.optim.Optimizer, not a NoneType"),
        ({"optimizer": []}, "not a list"),
        ({"sites": "fc1"}, "sites must be a list of the names of submodules, not 'fc1'"),
        ({"run_id": 7}, "run_id must be at most 128 characters, not 7"),
        ({"run_id": 129 * "x"}, "run_id must be at most 128 characters"),
        ({"step_budget_ms": "5"}, "step_budget_ms must be a number, not '5'"),
        ({"limits": {}}, "limits must be LocalLimits"),
        ({"mesh": "127.0.0.1:7"}, "mesh must be an esper_client.MeshAddress"),
        ({"learning_rate": 0.1}, "learning_rate must be a UnifiedLRController"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named_with_or_without_a_mesh(tmp_path, given, complaint):
    net = model()
    arguments = {"model": net, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)} | given
    with pytest.raises(ConfigError, match=complaint):
        trainer.attach(**arguments, environ={"ESPER_HOME": str(tmp_path)})


def test_a_model_that_could_not_be_attached_is_as_it_was(tmp_path):
    mesh = TemporaryMesh(tmp_path)
    mesh.identity("trainer")
    identity = mesh.identity_dir("trainer")
    net, address = model(), MeshAddress(tamiyo="127.0.0.1:1", urza="127.0.0.1:1", identity_dir=identity)
    layers, threads = [*net], set(threading.enumerate())
    optimizer, environ = torch.optim.SGD(net.parameters(), lr=0.1), {"ESPER_HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match="Cannot listen on nowhere:0"):
        trainer.attach(net, optimizer, mesh=address, environ=environ, kasmina_address="nowhere:0")
    assert all(now is before for now, before in zip(net, layers, strict=True))
    assert not [t.name for t in threading.enumerate() if t not in threads and t.name == "esper-loop"]
    with trainer.attach(net, optimizer, mesh=address, environ=environ) as session:
        assert session.step(0.5) == []
        with pytest.raises(ConfigError, match="attached already"):
            trainer.attach(net, optimizer, mesh=address, environ=environ)
        assert [type(layer).__name__ for layer in net][:1] == ["Site"]
