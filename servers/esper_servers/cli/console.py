"""What every command shares: its options, its output, its exit codes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from esper_rpc.errors import DeadlineExceeded, EsperError, InvalidRequest, Unavailable

from .home import Home

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="The mesh's directory. Default: $ESPER_HOME, ~/.esper.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
AddressOption = Annotated[str | None, typer.Option("--address", help="host:port. Default: as `esper up` wrote it.")]

Result = TypeVar("Result")


class Commands(TyperGroup):
    """A group that turns errors of the mesh and of the disk into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; 1 is a failure, 3 an unreachable peer."""
        try:
            return super().invoke(ctx)
        except EsperError as error:
            typer.echo(f"esper: {explain(error)}", err=True)
            raise typer.Exit(exit_code(error)) from error
        except OSError as error:
            # Of a pipe that was closed typer makes a quiet end; one without a number is no answer of the system.
            if isinstance(error, BrokenPipeError) or error.errno is None:
                raise
            typer.echo(f"esper: {error.filename or 'A file'} cannot be used ({error.strerror}).", err=True)
            raise typer.Exit(EXIT_FAILURE) from error


def exit_code(error: EsperError) -> int:
    """Return the exit code that stands for an error."""
    return EXIT_UNREACHABLE if isinstance(error, (Unavailable, DeadlineExceeded)) else EXIT_FAILURE


def explain(error: EsperError) -> str:
    """Say what went wrong, with the fields when the request was at fault."""
    if isinstance(error, InvalidRequest) and error.violations:
        fields = "; ".join(f"{v.field}: {v.description}" for v in error.violations)
        return f"{error.message} ({fields})"
    return error.message or error.reason


def home_of(context: typer.Context, option: Path | None) -> Home:
    """Find the home of a command, from its option or the environment that `main` read."""
    return Home.find(option, environ_of(context))


def environ_of(context: typer.Context) -> Mapping[str, str]:
    """Return the environment that `main` read."""
    found: Mapping[str, str] = context.find_root().obj or {}
    return found


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run asynchronous work from a command."""
    return asyncio.run(work)


def print_json(document: Any) -> None:
    """Print one JSON document to stdout."""
    sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2, default=str).decode() + "\n")


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print rows as a table, or as a JSON list."""
    if as_json:
        print_json(list(rows))
        return
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ("nothing",):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
