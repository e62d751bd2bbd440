"""docs/operate.md names every metric that esper_rpc/telemetry/metrics.py declares, with its labels."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SECTION = (ROOT / "docs" / "operate.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (`.+`) \| (.+) \|$", SECTION, re.MULTILINE)
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


def test_the_example_of_an_alert_asks_for_a_metric_that_there_is():
    rule = (ROOT / "docs" / "operate.md").read_text().partition("expr: ")[2].split()[0]
    assert rule in METRICS
