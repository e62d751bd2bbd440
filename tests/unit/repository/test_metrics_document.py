"""docs/operate.md names every metric that esper_rpc/telemetry/metrics.py declares, and every event of Tamiyo."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from esper_rpc.proto.tamiyo.v1 import StepLedger
from esper_servers.policy import schema
from esper_servers.tamiyo.risk.events import SOURCE

ROOT = Path(__file__).resolve().parents[3]
TAMIYO = ROOT / "servers" / "esper_servers" / "tamiyo"
TOLARIA = ROOT / "servers" / "esper_servers" / "tolaria"


def section(title):
    return (ROOT / "docs" / "operate.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


ROWS = re.findall(r"^\| (`.+`) \| (.+) \|$", section("Metrics"), re.MULTILINE)
COVERAGE_TYPES = {f"edges.{source}_{name}" for source, name, _ in schema.RELATIONS}
SUFFIX = {"Counter": "_total", "Gauge": "", "Histogram": ""}
GRPC = "grpc_server_call_"


def declared():
    """Every metric as it is rendered, with its labels."""
    tree = ast.parse((ROOT / "esper_rpc" / "telemetry" / "metrics.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SUFFIX:
            name = node.args[0].value + SUFFIX[ast.unparse(node.func)]
            yield name, [label.value for label in node.args[2].elts] if len(node.args) > 2 else []


METRICS = {name: labels for name, labels in declared() if not name.startswith(GRPC)}


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_metric_has_a_row_with_its_labels(name):
    rows = [told for names, told in ROWS if f"`{name}`" in names]
    assert rows, f"{name} is not in the table"
    assert all(f"`{label}`" in rows[0] for label in METRICS[name])


EVENTS = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \| ", section("Events"), re.MULTILINE))))
RISKS = set(re.findall(r"`(\w+)`", section("Risk")))
TRANSLATED = [row.split(" | ")[1] for row in section("Names of the design").splitlines() if row.startswith("| ")][2:]


def told(path):
    """The names of the events that a file tells, where they stand in it as they are."""
    tree = ast.parse(path.read_text())
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tell_event", "_tell", "self._tell"):
            for argument in node.args:
                name = (
                    constants.get(argument.id) if isinstance(argument, ast.Name) else getattr(argument, "value", None)
                )
                if isinstance(name, str) and name != SOURCE:
                    yield name


TOLD = sorted({name for path in TAMIYO.rglob("*.py") for name in told(path)})


@pytest.mark.parametrize("name", TOLD)
def test_an_event_has_a_row(name):
    assert name in EVENTS


def test_no_row_is_for_an_event_that_nothing_tells():
    source = "\n".join(path.read_text() for path in TAMIYO.rglob("*.py"))
    assert len(TOLD) > 10
    assert {name for name in EVENTS if f'"{name}"' not in source} == set()


TRAINER_ROWS = section("Emergencies").partition("| event of a trainer")[2]
TRAINER_EVENTS = set(re.findall(r"`([\w.]+)`", " ".join(re.findall(r"^\| (`.*?) \| ", TRAINER_ROWS, re.MULTILINE))))


def told_by_a_trainer(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tell":
            yield node.args[0].value


def test_the_events_of_a_trainer_are_those_of_the_table():
    assert {name for path in TOLARIA.rglob("*.py") for name in told_by_a_trainer(path)} == TRAINER_EVENTS


@pytest.mark.parametrize("row", TRANSLATED)
def test_a_name_that_stands_for_one_of_the_design_is_told_here(row):
    names = re.findall(r"`([\w.]+)`", row)
    assert names
    parts = {field.name.removesuffix("_us") for field in StepLedger.DESCRIPTOR.fields}
    others = {"grpc_status", "policy_version", "plan"} | parts
    known = {*METRICS, *(name for name, _ in declared()), *COVERAGE_TYPES, *EVENTS, *RISKS, *others}
    assert [name for name in names if name not in known] == []


def test_the_example_of_an_alert_asks_for_a_metric_that_there_is():
    rule = (ROOT / "docs" / "operate.md").read_text().partition("expr: ")[2].split()[0]
    assert rule in METRICS
