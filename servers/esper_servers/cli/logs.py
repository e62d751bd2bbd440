from __future__ import annotations

import contextlib
import heapq
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.text import Text

from .console import HomeOption, home_of
from .home import Home
from .log_files import oldest_first

POLL_SECONDS = 0.2
LEVELS = ("debug", "info", "warning", "error", "critical")
_STYLES = {"warning": "yellow", "error": "red", "critical": "bold red"}
_OWN_COLUMNS = ("timestamp", "at", "level", "event")

Entry = dict[str, Any]


def logs(
    context: typer.Context,
    service: Annotated[str | None, typer.Option(help="Only this service.")] = None,
    level: Annotated[str, typer.Option(help=f"The least level: {', '.join(LEVELS)}.")] = "info",
    match: Annotated[
        str | None, typer.Option(help="Only lines that hold this text: a run, a command id, a peer.")
    ] = None,
    audit: Annotated[bool, typer.Option("--audit", help="Refusals and admin calls instead of the logs.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the past.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is logged from now on.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    home: HomeOption = None,
) -> None:
    """Show what the services of this home logged, in the order of time."""
    if level not in LEVELS:
        raise typer.BadParameter(f"{level!r} is no level; choose from {', '.join(LEVELS)}.")
    files = log_files(home_of(context, home), service, audit=audit)
    wanted = Wanted(level=level, match=match)
    show = _print_json if as_json else _print_line
    past = [entry for entry in merged(files) if wanted(entry)]
    for entry in past[-lines:] if lines else []:
        show(entry)
    if follow:
        for entry in followed(files):
            if wanted(entry):
                show(entry)


def log_files(home: Home, service: str | None, *, audit: bool) -> dict[str, Path]:
    """Name the files by service."""
    suffix = ".audit.jsonl" if audit else ".log"
    found = {file.name.removesuffix(suffix): file for file in sorted((home.directory / "logs").glob(f"*{suffix}"))}
    if service is not None and service not in found:
        raise typer.BadParameter(f"no log of {service!r}; there are {', '.join(found) or 'none'}.")
    return {name: file for name, file in found.items() if service in (None, name)}


class Wanted:
    """Which entries are shown."""

    def __init__(self, *, level: str, match: str | None) -> None:
        self._rank = LEVELS.index(level)
        self._match = match

    def __call__(self, entry: Entry) -> bool:
        """Whether an entry is."""
        rank = LEVELS.index(entry["level"]) if entry.get("level") in LEVELS else len(LEVELS)
        has_text = self._match is None or self._match in orjson.dumps(entry).decode()
        return rank >= self._rank and has_text


def merged(files: dict[str, Path]) -> Iterator[Entry]:
    """Yield the entries of all files by time."""
    with contextlib.ExitStack() as opened:
        streams = [
            _entries(name, opened.enter_context(part.open(errors="replace")))
            for name, file in files.items()
            for part in oldest_first(file)
        ]
        yield from heapq.merge(*streams, key=_time_of)


def followed(files: dict[str, Path]) -> Iterator[Entry]:
    """Yield entries as they are written, for ever."""
    with contextlib.ExitStack() as opened:
        streams = {name: opened.enter_context(file.open(errors="replace")) for name, file in files.items()}
        for stream in streams.values():
            stream.seek(0, 2)
        while True:
            for stream in streams.values():
                if os.fstat(stream.fileno()).st_size < stream.tell():
                    stream.seek(0)  # It was emptied.
            entries = [entry for name, stream in streams.items() for entry in _entries(name, stream)]
            yield from sorted(entries, key=_time_of)
            if not entries:
                time.sleep(POLL_SECONDS)


def _entries(name: str, stream: IO[str]) -> Iterator[Entry]:
    for line in stream:
        try:
            parsed = orjson.loads(line)
        except orjson.JSONDecodeError:
            parsed = {"event": line.rstrip(), "level": "error"}  # A traceback, or a library's own words.
        yield {"service": name, **parsed} if isinstance(parsed, dict) else {"service": name, "event": str(parsed)}


def _time_of(entry: Entry) -> str:
    return str(entry.get("timestamp") or entry.get("at") or "")


def _print_json(entry: Entry) -> None:
    typer.echo(orjson.dumps(entry).decode())


def _print_line(entry: Entry) -> None:
    details = " ".join(f"{k}={v}" for k, v in entry.items() if k not in (*_OWN_COLUMNS, "service"))
    line = f"{_time_of(entry)[:23]:23} {entry['service']:12} {entry.get('event', '')} {details}".rstrip()
    Console(soft_wrap=True).print(Text(line, style=_STYLES.get(str(entry.get("level")), "")))
