"""`esper bench`: figures, one JSON object each."""

from __future__ import annotations

import typer

from esper_servers.cli.console import Commands

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Measure the mesh on this machine.")
