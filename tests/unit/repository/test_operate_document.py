"""The table of settings in docs/operate.md says what the code reads from esper.toml, no more and no less."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
import typing
from pathlib import Path

import pytest

from esper_client.session import SessionConfig
from esper_rpc.config import Range
from esper_rpc.errors import ConfigError
from esper_servers.cli.doctor import settings_sections
from esper_servers.kasmina.limits import LocalLimits

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = [ROOT / "esper_rpc", ROOT / "clients" / "esper_client", ROOT / "servers" / "esper_servers"]
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| `([^`]*)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
SECTIONS = settings_sections()
BASES = {"breaker": SessionConfig().breaker}
"""What a section starts from, where that is not the class as it stands."""


class Setting(typing.NamedTuple):
    default: object
    allowed: str
    purpose: str


def documented():
    table = (ROOT / "docs" / "operate.md").read_text().partition("\n## Settings\n")[2]
    rows = ROW.findall(table)
    assert len(rows) == len([line for line in table.splitlines() if line.startswith("| `")]), "a row is malformed"
    return {
        (section, key): Setting(tomllib.loads(f"x = {default}")["x"], allowed.strip(), purpose.strip())
        for section, key, default, allowed, purpose in rows
    }


def declared():
    """Every setting with its default and its type hint: what `load` accepts."""
    found = {}
    for section, config_class in SECTIONS.items():
        defaults = BASES.get(section) or config_class()
        hints = typing.get_type_hints(config_class, include_extras=True)
        for key, hint in hints.items():
            if not dataclasses.is_dataclass(hint):
                found[section, key] = (getattr(defaults, key), hint)
    return found


DOCUMENTED, DECLARED = documented(), declared()


def loaded_sections(source):
    """The pairs of class and section in calls of `load`."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {
        (ast.unparse(call.args[0]), call.args[1].value)
        for call in calls
        if ast.unparse(call.func) == "load" and len(call.args) == 2 and isinstance(call.args[1], ast.Constant)
    }


def test_every_section_that_is_loaded_is_known():
    sources = [path.read_text() for package in PACKAGES for path in package.rglob("*.py")]
    loaded = set().union(*(loaded_sections(source) for source in sources))
    assert loaded == {(config_class.__name__, section) for section, config_class in SECTIONS.items()}


def test_every_setting_has_a_row_and_every_row_is_a_setting():
    assert DOCUMENTED.keys() == DECLARED.keys()


@pytest.mark.parametrize("name", sorted(DECLARED), ids=".".join)
def test_a_row_tells_the_default_and_the_bounds(name):
    row, (default, hint) = DOCUMENTED[name], DECLARED[name]
    assert row.default == (list(default) if isinstance(default, tuple) else default)
    assert type(row.default) is (list if isinstance(default, tuple) else type(default))
    assert row.purpose
    bounds = [found for found in getattr(hint, "__metadata__", ()) if isinstance(found, Range)]
    if bounds:
        least, _, most = row.allowed.replace(" ", "").partition("to")
        assert (float(least), float(most)) == (bounds[0].least, bounds[0].most)
    else:
        assert " to " not in row.allowed


def test_what_the_document_says_of_the_environment_holds():
    example = re.search(r"`ESPER_([A-Z]+)_([A-Z_]+)=", (ROOT / "docs" / "operate.md").read_text())
    assert (example[1].lower(), example[2].lower()) in DECLARED


def test_the_bounds_of_the_pair_are_those_of_its_refusal():
    with pytest.raises(ConfigError) as refused:
        LocalLimits(learning_rate_multiplier=(2.0, 0.1))
    assert DOCUMENTED["limits", "learning_rate_multiplier"].allowed in refused.value.message
