from __future__ import annotations

import hashlib

import orjson
import pytest

from esper_client import UrzaClient
from esper_rpc import errors
from esper_rpc.proto.leyline.v1 import KernelPrefetchRequest
from esper_rpc.proto.urza.v1 import (
    BatchGetExtrasRequest,
    FetchKernelRequest,
    GetBlueprintRequest,
    GetExtrasRequest,
    KernelHeader,
    ListBlueprintsRequest,
    PrefetchRequest,
    SaveBlueprintRequest,
    UploadKernelRequest,
    WatchCatalogRequest,
    urza_service_pb2,
)
from esper_rpc.testing import serving
from esper_servers.urza.library import BlueprintLibrary
from esper_servers.urza.seeding import installed_blueprints
from esper_servers.urza.service import UrzaServicer

URZA = urza_service_pb2.DESCRIPTOR.services_by_name["UrzaService"]
BUILT_IN = [
    "attention_adapter", "bottleneck_adapter", "depthwise_conv", "gated_residual", "lora_linear", "norm_affine",
    "residual_mlp", "squeeze_excite",
]  # fmt: skip
WEIGHTS = bytes(range(256)) * 4096


@pytest.fixture
def library(tmp_path):
    opened = BlueprintLibrary(tmp_path / "urza")
    for request in installed_blueprints():
        opened.save(request.blueprint, request.extras_json)
    yield opened
    opened.close()


@pytest.fixture
async def urza(mesh, library):
    async with serving(mesh.identity("urza"), (URZA, UrzaServicer(library))) as server:
        async with UrzaClient(server.address, identity=mesh.identity("operator")) as client:
            yield client


async def kernel_blueprint(urza, name="with_weights", weights=WEIGHTS):
    blueprint = (await urza.get_blueprint(GetBlueprintRequest(blueprint_id="lora_linear"))).blueprint
    blueprint.descriptor.blueprint_id = name
    blueprint.manifest.weights_sha256 = hashlib.sha256(weights).digest()
    await urza.save_blueprint(SaveBlueprintRequest(blueprint=blueprint))
    return name


async def parts(name, content, *, size=None, digest=None):
    header = KernelHeader(
        blueprint_id=name, size_bytes=size or len(content), sha256=digest or hashlib.sha256(content).digest()
    )
    yield UploadKernelRequest(header=header)
    for start in range(0, len(content), 100_000):
        yield UploadKernelRequest(chunk=content[start : start + 100_000])


async def test_the_catalogue_is_paged_in_order(urza):
    names, token = [], ""
    while True:
        page = await urza.list_blueprints(ListBlueprintsRequest(page_size=3, page_token=token))
        names += [b.descriptor.blueprint_id for b in page.blueprints]
        token = page.next_page_token
        if not token:
            break
    assert names == BUILT_IN


async def test_blueprints_are_found_by_tag(urza):
    page = await urza.list_blueprints(ListBlueprintsRequest(tags=["conv"]))
    assert [b.descriptor.blueprint_id for b in page.blueprints] == ["depthwise_conv", "squeeze_excite"]


async def test_extras_are_computed_from_the_module_and_carry_their_digest(urza):
    extras = (await urza.get_extras(GetExtrasRequest(blueprint_id="residual_mlp"))).extras
    document = orjson.loads(extras.extras_json)
    assert [layer["type"] for layer in document["layers"]] == ["LayerNorm", "Linear", "Linear"]
    assert sum(layer["parameter_count"] for layer in document["layers"]) == 2 * 32 + 32 * 128 + 128 + 128 * 32 + 32
    assert extras.extras_digest == hashlib.sha256(extras.extras_json).digest()


async def test_a_batch_names_what_it_does_not_know(urza):
    response = await urza.batch_get_extras(BatchGetExtrasRequest(blueprint_ids=["nope", "lora_linear"]))
    assert [e.blueprint_id for e in response.extras] == ["lora_linear"]
    assert list(response.unknown_blueprint_ids) == ["nope"]


async def test_a_blueprint_without_extras_has_an_empty_document(urza):
    name = await kernel_blueprint(urza)
    assert (await urza.get_extras(GetExtrasRequest(blueprint_id=name))).extras.extras_json == b"{}"


async def test_a_blueprint_is_immutable(urza):
    blueprint = (await urza.get_blueprint(GetBlueprintRequest(blueprint_id="lora_linear"))).blueprint
    extras = (await urza.get_extras(GetExtrasRequest(blueprint_id="lora_linear"))).extras.extras_json
    again = await urza.save_blueprint(SaveBlueprintRequest(blueprint=blueprint, extras_json=extras))
    assert not again.created
    blueprint.manifest.config_json = "{}"
    with pytest.raises(errors.AlreadyExists, match="new identifier"):
        await urza.save_blueprint(SaveBlueprintRequest(blueprint=blueprint, extras_json=extras))


@pytest.mark.parametrize("extras", [b"{", b"[1]"])
async def test_extras_that_are_no_json_object_are_refused(urza, extras):
    blueprint = (await urza.get_blueprint(GetBlueprintRequest(blueprint_id="lora_linear"))).blueprint
    blueprint.descriptor.blueprint_id = "other"
    with pytest.raises(errors.InvalidRequest):
        await urza.save_blueprint(SaveBlueprintRequest(blueprint=blueprint, extras_json=extras))


async def test_a_kernel_comes_back_as_it_went_up(urza):
    name = await kernel_blueprint(urza)
    await urza.upload_kernel(parts(name, WEIGHTS))
    received = b"".join([part.chunk async for part in urza.fetch_kernel(FetchKernelRequest(blueprint_id=name))])
    assert received == WEIGHTS


@pytest.mark.parametrize(
    "broken",
    [{"size": len(WEIGHTS) + 1}, {"size": 10}, {"digest": bytes(32)}],
    ids=["ends early", "larger than said", "another content"],
)
async def test_a_broken_upload_keeps_nothing(urza, broken):
    name = await kernel_blueprint(urza)
    with pytest.raises(errors.InvalidRequest):
        await urza.upload_kernel(parts(name, WEIGHTS, **broken))
    with pytest.raises(errors.NotFound):
        await anext(urza.fetch_kernel(FetchKernelRequest(blueprint_id=name)))


async def test_a_kernel_damaged_on_the_disk_is_never_served(urza, tmp_path):
    name = await kernel_blueprint(urza)
    await urza.upload_kernel(parts(name, WEIGHTS))
    (file,) = [p for p in (tmp_path / "urza" / "kernels").rglob("*") if p.is_file()]
    file.write_bytes(b"x" + WEIGHTS[1:])
    with pytest.raises(errors.DataLoss):
        await anext(urza.fetch_kernel(FetchKernelRequest(blueprint_id=name)))
    prefetch = KernelPrefetchRequest(request_id="p", blueprint_id=name)
    assert (await urza.prefetch(PrefetchRequest(prefetch=prefetch))).error.reason == "DATA_LOSS"


async def test_a_watcher_sees_the_catalogue_then_the_change(urza):
    watch = urza.watch_catalog(WatchCatalogRequest())
    seen = [(await anext(watch)).update.blueprint_id for _ in BUILT_IN]
    await kernel_blueprint(urza, "brand_new")
    assert seen == BUILT_IN
    assert (await anext(watch)).update.blueprint_id == "brand_new"
    await watch.aclose()


async def test_the_library_survives_a_restart(library, tmp_path):
    library.close()
    again = BlueprintLibrary(tmp_path / "urza")
    assert [b.descriptor.blueprint_id for b in again.list_from("", 100)] == BUILT_IN
    again.close()


def test_a_state_directory_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ConfigError, match="cannot be written"):
        BlueprintLibrary(tmp_path / "file" / "urza")
