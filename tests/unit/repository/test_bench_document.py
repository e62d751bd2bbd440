from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from esper_servers.cli.bench import app

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "bench.md").read_text()
COMMANDS = {name: command for name, command in get_command(app).commands.items() if not command.hidden}


def test_the_page_of_benchmarks_has_a_row_and_the_keys_of_every_command():
    assert set(re.findall(r"^\| `([a-z]+)` \|", DOCUMENT, re.MULTILINE)) == set(COMMANDS)
    assert set(re.findall(r"^\*\*`([a-z]+)`\*\*", DOCUMENT, re.MULTILINE)) == set(COMMANDS)


def test_the_options_of_a_row_are_those_of_its_command():
    for name, command in COMMANDS.items():
        row = re.search(rf"^\| `{name}` \|.*$", DOCUMENT, re.MULTILINE)[0]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", row)) == known - {"--json", "--help"}
