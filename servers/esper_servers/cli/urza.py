from __future__ import annotations

from typing import Annotated, Any

import orjson
import typer

from esper_rpc.proto.leyline.v1 import BlueprintTier
from esper_rpc.proto.urza.v1 import Blueprint, GetBlueprintRequest, GetExtrasRequest, ListBlueprintsRequest

from .console import AddressOption, Commands, HomeOption, JsonOption, home_of, print_json, print_rows, run
from .home import Home
from .pages import pages

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The library of blueprints.")


@app.command(epilog="Example: esper urza seed --home ~/.esper")
def seed(context: typer.Context, home: HomeOption = None) -> None:
    """Install the blueprints of every installed package; again changes nothing."""
    from esper_servers.urza.library import BlueprintLibrary
    from esper_servers.urza.seeding import installed_blueprints

    place = home_of(context, home)
    library = BlueprintLibrary(place.state_dir("urza"))
    try:
        saved = [library.save(entry.blueprint, entry.extras_json)[1] for entry in installed_blueprints()]
    finally:
        library.close()
    typer.echo(f"{sum(saved)} of {len(saved)} blueprints added to {place.state_dir('urza')}")


@app.command("list", epilog="Example: esper urza list --json")
def show_all(
    context: typer.Context, address: AddressOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """List the blueprints that Urza serves."""
    blueprints = run(_list(home_of(context, home), address))
    print_rows("Blueprints", [_row(blueprint) for blueprint in blueprints], as_json=as_json)


@app.command(epilog="Example: esper urza show residual_mlp --json")
def show(
    context: typer.Context,
    blueprint_id: Annotated[str, typer.Argument(help="As `esper urza list` names it.")],
    address: AddressOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one blueprint with its extras."""
    document = run(_show(home_of(context, home), address, blueprint_id))
    if as_json:
        print_json(document)
        return
    print_rows(blueprint_id, [{"field": k, "value": v} for k, v in document.items() if k != "extras"], as_json=False)


async def _list(home: Home, address: str | None) -> list[Blueprint]:
    from esper_client.client import UrzaClient

    async with UrzaClient(home.address("urza", address), identity=home.identity()) as client:
        found = await pages(client.list_blueprints, ListBlueprintsRequest())
    return [blueprint for page in found for blueprint in page.blueprints]


async def _show(home: Home, address: str | None, blueprint_id: str) -> dict[str, Any]:
    from esper_client.client import UrzaClient

    async with UrzaClient(home.address("urza", address), identity=home.identity()) as client:
        answer = await client.get_blueprint(GetBlueprintRequest(blueprint_id=blueprint_id))
        extras = await client.get_extras(GetExtrasRequest(blueprint_id=blueprint_id))
    manifest = answer.blueprint.manifest
    return {
        **_row(answer.blueprint),
        "description": answer.blueprint.descriptor.description,
        "config": orjson.loads(manifest.config_json or "{}"),
        "output": list(manifest.output_shape),
        "extras_digest": extras.extras.extras_digest.hex(),
        "extras": orjson.loads(extras.extras.extras_json or b"{}"),
    }


def _row(blueprint: Blueprint) -> dict[str, Any]:
    descriptor, manifest = blueprint.descriptor, blueprint.manifest
    return {
        "blueprint": descriptor.blueprint_id,
        "tier": BlueprintTier.Name(descriptor.tier).removeprefix("BLUEPRINT_TIER_").lower(),
        "risk": round(descriptor.risk, 3),
        "factory": manifest.factory,
        "input": list(manifest.input_shape),
    }
