from __future__ import annotations

import time
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


@app.command(epilog="Example: esper keys rotate --settle 5")
def rotate(
    context: typer.Context,
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds that members get to read the new key before it signs.")
    ] = 5.0,
    home: HomeOption = None,
) -> None:
    """Add a root, let every member learn it, then sign with it. Nothing restarts; the root before stays valid.

    Keyrings of other machines are written here as well: copy each between `add` and `activate`, which this does at
    once for members of this machine only.
    """
    place = home_of(context, home)
    roots = _retire_all_but_active(place)
    roots = _rewrite(place, roots.with_new_root())
    typer.echo(f"added {roots.newest_key_id}; waiting {settle:g} s until every member has read it")
    time.sleep(settle)
    roots = _rewrite(place, roots.with_active(roots.newest_key_id))
    typer.echo(f"active {roots.active_key_id}; the one before is still accepted until it is retired")


@app.command(epilog="Example: esper keys add")
def add(context: typer.Context, home: HomeOption = None) -> None:
    """Add a root that is verified and does not sign yet: the first half of a rotation."""
    place = home_of(context, home)
    roots = _rewrite(place, RootKeys.load(place.root_keys).with_new_root())
    typer.echo(f"added {roots.newest_key_id}; give every member its keyring, then: esper keys activate")


@app.command(epilog="Example: esper keys activate")
def activate(
    context: typer.Context,
    key_id: Annotated[str | None, typer.Argument(help="Default: the root that was added last.")] = None,
    home: HomeOption = None,
) -> None:
    """Sign with a root from now on: the second half of a rotation."""
    place = home_of(context, home)
    roots = RootKeys.load(place.root_keys)
    roots = _rewrite(place, roots.with_active(key_id or roots.newest_key_id))
    typer.echo(f"active {roots.active_key_id}")


@app.command(epilog="Example: esper keys retire 1f2e3d4c5b6a7988")
def retire(
    context: typer.Context,
    key_id: Annotated[str, typer.Argument(help="As `esper keys list` shows it.")],
    home: HomeOption = None,
) -> None:
    """Forget a root: what it signed is refused from now on."""
    place = home_of(context, home)
    _rewrite(place, RootKeys.load(place.root_keys).without(key_id))
    typer.echo(f"retired {key_id}")


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


def _retire_all_but_active(home: Home) -> RootKeys:
    roots = RootKeys.load(home.root_keys)
    for key_id in [k for k in roots.roots if k != roots.active_key_id]:
        roots = roots.without(key_id)
    return roots


def _rewrite(home: Home, roots: RootKeys) -> RootKeys:
    roots.save(home.root_keys)
    home.reissue_keyrings()
    return roots


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
