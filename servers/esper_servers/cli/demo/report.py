"""What the demo shows at its end: tables, and a page with plots."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from esper_rpc.ledger import percentiles_ms
from esper_servers.cli import charts

Result = Mapping[str, Any]
_BLENDED = ("BLENDING", "SHADOWING", "PROBATIONARY")
_WITH, _WITHOUT = "#0b6e4f", "#8a8a8a"


def summarise(mesh: Result, plain: Result, tamiyo: Result, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Boil two trainings down to the figures of the final table."""
    with_mesh, without = mesh["history"], plain["history"]
    status = tamiyo["status"]
    return {
        "steps": settings["steps"],
        "accuracy": {"with_mesh": with_mesh["accuracies"][-1][1], "without": without["accuracies"][-1][1]},
        "loss": {"with_mesh": _tail_mean(with_mesh["losses"]), "without": _tail_mean(without["losses"])},
        "policy": {key: tamiyo["policy"].get(key, "") for key in ("policy_version", "origin", "plan")},
        "seeds": _last_stages(with_mesh["seeds"]),
        "decisions": {key: int(value) for key, value in sorted(status.get("decisions", {}).items())},
        "reasons": {key: int(value) for key, value in sorted(status.get("reasons", {}).items())},
        "outcomes": _count_outcomes(with_mesh["outcomes"]),
        "step_latency": percentiles_ms(value * 1e3 for value in with_mesh["mesh_ms"]),
        "parts": mesh["timings"],
        "step_budget_ms": settings["step_budget_ms"],
        "misses": mesh["misses"],
        "miss_rate": round(mesh["misses"] / max(1, settings["steps"]), 4),
        "late_answers": mesh["late_answers"],
        "overhead": _overhead(with_mesh, without),
    }


def print_tables(summary: Mapping[str, Any]) -> None:
    """Print the final table."""
    table = Table(title=f"Digits, {summary['steps']} steps", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for label, text in lines(summary):
        table.add_row(label, text)
    Console().print(table)


def lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the final table."""
    accuracy, latency, overhead = summary["accuracy"], summary["step_latency"], summary["overhead"]
    gain = (accuracy["with_mesh"] - accuracy["without"]) * 100
    return [
        ("Accuracy with the mesh", f"{accuracy['with_mesh']:.2%} ({gain:+.2f} points)"),
        ("Accuracy without", f"{accuracy['without']:.2%}"),
        ("Seeds", "\n".join(_seed_line(seed, state) for seed, state in summary["seeds"].items())),
        ("Decisions by type", _listing(summary["decisions"])),
        ("Decisions by reason", _listing(summary["reasons"])),
        ("Commands at the host", _listing(summary["outcomes"])),
        ("Policy", "{policy_version} ({plan}): {origin}".format(**summary["policy"])),
        ("Step latency", "  ".join(f"{key.removesuffix('_ms')} {value:.2f} ms" for key, value in latency.items())),
        ("Misses", f"{summary['misses']} at {summary['step_budget_ms']:g} ms ({summary['miss_rate']:.2%})"),
        (
            "Overhead",
            "{total_percent:.1f} %: {mesh_percent:.1f} asking and applying, {seeds_percent:.1f} in the model for its"
            " seeds".format(**overhead),
        ),
    ]


def write_html(path: Path, mesh: Result, plain: Result, summary: Mapping[str, Any]) -> Path:
    """Write one page that needs no other file."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in lines(summary))
    plots = "".join(
        f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{image}"></figure>'
        for title, image in _plots(mesh["history"], plain["history"], summary)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PAGE.format(rows=rows, plots=plots))
    return path


def _plots(mesh: Result, plain: Result, summary: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    import matplotlib as mpl

    mpl.use("Agg")
    yield "Accuracy", _accuracy_plot(mesh, plain)
    yield "Loss", _loss_plot(mesh, plain)
    yield "Seeds", _seed_plot(mesh)
    yield "Step latency", _latency_plot(mesh, summary["step_budget_ms"])


def _accuracy_plot(mesh: Result, plain: Result) -> str:
    figure, [axes] = charts.figure("Accuracy on held-out digits")
    for history, label, colour in ((mesh, "with the mesh", _WITH), (plain, "without", _WITHOUT)):
        steps, values = zip(*history["accuracies"], strict=True)
        axes.plot(steps, values, marker="o", markersize=3, label=label, color=colour)
    _mark_changes(axes, mesh)
    axes.legend()
    return _encode(figure)


def _loss_plot(mesh: Result, plain: Result) -> str:
    figure, [axes] = charts.figure("Training loss, mean of 20 steps")
    axes.plot(_smooth(plain["losses"]), label="without", color=_WITHOUT)
    axes.plot(_smooth(mesh["losses"]), label="with the mesh", color=_WITH)
    _mark_changes(axes, mesh)
    axes.set_yscale("log")
    axes.legend()
    return _encode(figure)


def _seed_plot(mesh: Result) -> str:
    figure, [axes] = charts.figure("Alpha of each seed, while seeds change")
    for seed in sorted({row[1] for row in mesh["seeds"]}):
        steps, alphas = zip(*((row[0], row[3]) for row in mesh["seeds"] if row[1] == seed), strict=True)
        axes.plot(steps, alphas, label=seed)
    _mark_changes(axes, mesh, label=True)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlim(0, 1.1 * max((row[0] for row in mesh["outcomes"]), default=len(mesh["losses"])))
    if mesh["seeds"]:
        axes.legend(loc="center right")
    return _encode(figure)


def _latency_plot(mesh: Result, budget_ms: float) -> str:
    figure, [axes] = charts.figure("session.step(), milliseconds")
    axes.hist([min(value, 2 * budget_ms) for value in mesh["mesh_ms"]], bins=80, color=_WITH)
    axes.axvline(budget_ms, color="#b3261e", linestyle="--", label="budget")
    axes.legend()
    return _encode(figure)


def _mark_changes(axes: Any, mesh: Result, *, label: bool = False) -> None:
    for step, _, operation, result, _ in mesh["outcomes"]:
        if result == "APPLIED" and operation != "UNSPECIFIED":
            axes.axvline(step, color="#c9a227", linewidth=0.6, alpha=0.7)
            if label:
                axes.text(step, 0.02, operation.lower(), rotation=90, fontsize=6, color="#7a6212")


def _encode(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _smooth(values: Sequence[float], window: int = 20) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def _tail_mean(values: Sequence[float], count: int = 50) -> float:
    tail = values[-count:]
    return round(sum(tail) / max(1, len(tail)), 4)


def _last_stages(seeds: Sequence[Sequence[Any]]) -> dict[str, dict[str, Any]]:
    return {seed: {"stage": stage, "alpha": alpha} for _, seed, stage, alpha in seeds}


def _count_outcomes(outcomes: Sequence[Sequence[Any]]) -> dict[str, int]:
    settled = (row for row in outcomes if row[3] != "QUEUED")
    counts = Counter(" ".join(filter(None, (_asked(*row[2:4]), row[3].lower(), row[4]))) for row in settled)
    return dict(sorted(counts.items()))


def _asked(operation: str, result: str) -> str:
    # An outcome names the operation of seed commands only, and what came late was never opened.
    unnamed = "command" if result == "LATE" else "pause or optimizer"
    return unnamed if operation == "UNSPECIFIED" else operation.lower()


def _overhead(mesh: Result, plain: Result) -> dict[str, float]:
    base, work, asked = sum(plain["work_ms"]), sum(mesh["work_ms"]), sum(mesh["mesh_ms"])
    return {
        "mesh_percent": round(100 * asked / base, 2),
        "seeds_percent": round(100 * (work - base) / base, 2),
        "total_percent": round(100 * (work + asked - base) / base, 2),
    }


def _seed_line(seed: str, state: Mapping[str, Any]) -> str:
    blended = state["stage"] in _BLENDED
    return f"{seed}: {state['stage'].lower()}" + (f", alpha {state['alpha']:g}" if blended else "")


def _listing(counts: Mapping[str, int]) -> str:
    return "\n".join(f"{name}: {count}" for name, count in counts.items()) or "none"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Esper demo</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d1d1f }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .8rem; border-bottom: 1px solid #e3e3e6;
  white-space: pre-line }}
th {{ width: 14rem; font-weight: 600 }} figure {{ margin: 1.5rem 0 }} img {{ max-width: 100% }}
</style></head><body><h1>A mesh that steers a training</h1><table>{rows}</table>{plots}</body></html>
"""
