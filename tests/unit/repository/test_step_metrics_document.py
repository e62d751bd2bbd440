"""Whatever Tamiyo reads of a step is a metric that docs/operate.md names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from esper_servers.policy import schema
from esper_servers.tamiyo.field_reports.observations import LATENCIES

ROOT = Path(__file__).resolve().parents[3]
JUDGING = ROOT / "servers" / "esper_servers" / "tamiyo"
DOCUMENTED = set(re.findall(r"`([\w.]+)`", (ROOT / "docs" / "operate.md").read_text()))
MASKED_ALWAYS = 2
"""The last features of the global node are fields of the packet, not metrics."""


def read(path):
    """The names of metrics that a file asks a step for."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            continue
        asks = node.func.attr == "metric" or (
            node.func.attr == "get" and ast.unparse(node.func.value).endswith("metrics")
        )
        if asks and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value


def test_decisions_rely_on_documented_metrics_only():
    names = {name for path in JUDGING.rglob("*.py") for name in read(path)}
    names |= {*schema.FEATURES["global"][:-MASKED_ALWAYS], *LATENCIES}
    assert {"gradient_norm", "hook_latency_ms", "cpu_util_percent", "grad_var"} <= names
    assert names - DOCUMENTED == set()
