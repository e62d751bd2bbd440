from __future__ import annotations

from typing import Annotated, Any

import typer

from esper_rpc.envelope import Keyring, RootKeys
from esper_rpc.errors import ConfigError
from esper_rpc.identity import SpiffeId

from .console import Commands, HomeOption, JsonOption, home_of, print_json, print_rows
from .home import INSTANCE, Home

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Signing keys: whose commands are obeyed.")


@app.command(epilog="Example: esper keys init --home ~/.esper")
def init(context: typer.Context, home: HomeOption = None) -> None:
    """Draw the root that every signing key is derived from."""
    place = home_of(context, home)
    keys = RootKeys.create(place.root_keys)
    typer.echo(f"{place.root_keys}: root {keys.active_key_id} made. Services never read this file.")


@app.command(epilog="Example: esper keys issue trainer gpu-3")
def issue(
    context: typer.Context,
    role: Annotated[str, typer.Argument(help="trainer, tamiyo, urza, operator, ...")],
    instance: Annotated[str, typer.Argument(help="Which one of that role.")] = INSTANCE,
    home: HomeOption = None,
) -> None:
    """Write the keyring of a member: what it signs with and what it can verify."""
    place = home_of(context, home)
    keyring = place.issue_keyring(SpiffeId(role, instance))
    typer.echo(f"{place.identity_dir(role, instance) / 'keyring.json'}: key {keyring.active_key_id}")


@app.command("list", epilog="Example: esper keys list --json")
def show(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List roots and keyrings by name; secrets are never shown."""
    place = home_of(context, home)
    roots = RootKeys.load(place.root_keys)
    files = sorted((place.directory / "identities").glob("*/keyring.json"))
    rows = [_describe(place, file.parent.name) for file in files]
    if as_json:
        print_json({"active_key_id": roots.active_key_id, "key_ids": sorted(roots.roots), "keyrings": rows})
        return
    typer.echo(f"Active root {roots.active_key_id} of {len(roots.roots)}")
    print_rows("Keyrings", rows, as_json=False)


def _describe(home: Home, name: str) -> dict[str, Any]:
    try:
        keyring = Keyring.load(home.directory / "identities" / name / "keyring.json")
    except ConfigError as error:
        return {"identity": name, "role": "", "active_key_id": "", "verifies": [], "problem": error.message}
    return {
        "identity": name,
        "role": keyring.role,
        "active_key_id": keyring.active_key_id,
        "verifies": sorted(keyring.issuers()),
        "problem": "",
    }
