from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.live import Live
from rich.table import Table

from esper_rpc.errors import ConfigError, Unavailable

from .console import HomeOption, JsonOption, home_of, print_json, run
from .home import Home
from .status import collect

Samples = dict[tuple[str, ...], float]
"""By name, then the values of the labels in the order of their names."""

PART = "esper_decision_part_seconds_bucket"


def top(
    context: typer.Context,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="How many looks; 0 goes on until Ctrl-C.")] = 0,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Watch a running mesh: services, decisions a second and their latency, runs."""
    watcher = Watcher(home_of(context, home))
    looks = iter(range(count)) if count else iter(int, 1)
    if as_json:
        for _ in looks:
            time.sleep(every)
            print_json(watcher.look())
        return
    with Live(auto_refresh=False, screen=False) as live:
        for _ in looks:
            time.sleep(every)
            live.update(render(watcher.look()), refresh=True)


class Watcher:
    """Takes looks at a mesh; rates are between one look and the next."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._before = scrape(home)
        self._at = time.monotonic()

    def look(self) -> dict[str, Any]:
        """Return services, rates, latencies and runs."""
        samples, now = scrape(self._home), time.monotonic()
        delta = {key: value - self._before.get(key, 0.0) for key, value in samples.items()}
        seconds, self._before, self._at = now - self._at, samples, now
        status = run(collect(self._home))
        decided = sum(value for key, value in delta.items() if key[0] == "esper_decisions_total")
        return {
            "services": [self._service(row, samples) for row in status["services"]],
            "decisions_per_second": round(decided / seconds, 1),
            "decision_ms": {part: quantiles(delta, part) for part in ("total", "inference", "queue")},
            "runs": status.get("tamiyo", {}).get("runs", []),
            "conservative_mode": bool(status.get("tamiyo", {}).get("conservative_mode")),
        }

    def _service(self, row: Mapping[str, Any], samples: Samples) -> dict[str, Any]:
        name = row["service"]
        memory = samples.get((f"esper_{name}_process_resident_memory_bytes",), 0.0)
        cpu = samples.get((f"esper_{name}_process_cpu_seconds_total",), 0.0)
        return {
            "service": name,
            "health": row["health"] or row["problem"],
            "rss_mb": round(memory / 2**20),
            "cpu_s": cpu,
        }


def scrape(home: Home) -> Samples:
    """Read /metrics of the mesh; raises Unavailable."""
    address = home.read_mesh().get("metrics")
    if not address:
        raise ConfigError(f"{home.mesh_file} names no metrics endpoint; run `esper up`.")
    try:
        text = httpx.get(f"http://{address}/metrics", timeout=5).raise_for_status().text
    except httpx.HTTPError as error:
        raise Unavailable(f"No metrics at {address}: {error}. Is `esper up` running?") from error
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *(s.labels[k] for k in sorted(s.labels))): s.value for s in samples}


def quantiles(delta: Samples, part: str) -> dict[str, float]:
    """Return p50, p95 and p99 in milliseconds: the upper end of the histogram's bucket that holds each."""
    buckets = sorted((float(key[1]), value) for key, value in delta.items() if key[0] == PART and key[2] == part)
    total = buckets[-1][1] if buckets else 0.0
    found = {}
    for share in (50, 95, 99):
        reached = [bound for bound, value in buckets if total and value >= total * share / 100]
        found[f"p{share}"] = round(reached[0] * 1000, 3) if reached else 0.0
    return found


def render(look: Mapping[str, Any]) -> Group:
    """Lay a look out for a terminal."""
    services = _table("Services", look["services"])
    title = f"{look['decisions_per_second']} decisions/s" + ("  CONSERVATIVE" if look["conservative_mode"] else "")
    latencies = _table(title, [{"ms": part, **values} for part, values in look["decision_ms"].items()])
    runs = [
        {
            "run": r["run_id"],
            "step": r.get("global_step", 0),
            "commands": r.get("issued_commands", 0),
            "owner": r["owner"],
        }
        for r in look["runs"]
    ]
    return Group(services, latencies, _table("Runs", runs))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ("none",):
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table
