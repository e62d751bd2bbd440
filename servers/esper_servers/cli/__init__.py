"""The `esper` command."""

from __future__ import annotations

import os

import typer

from esper_rpc.logging import log_warnings_to_stderr

from . import (
    bench,
    contract_test,
    decisions,
    demo,
    doctor,
    dumps,
    keys,
    logs,
    pauses,
    pki,
    plan,
    policy,
    reports,
    serve,
    sign,
    status,
    top,
    training,
    up,
    urza,
)
from .console import Commands

_COMMAND = "5b3c9a52-6d0e-4b7a-9d1f-0c2f6f1f8a11"

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Steer neural-network training while it runs.",
    epilog="Exit codes: 0 done, 1 failure, 2 wrong usage, 3 a peer cannot be reached.",
)
app.command(epilog="Example: esper up --home ~/.esper")(up.up)
app.command(epilog="Example: esper demo --home var/demo")(demo.demo)
app.command(epilog="Example: esper status --json")(status.status)
app.command(epilog="Example: esper doctor")(doctor.doctor)
app.command(epilog="Example: esper logs --service tamiyo --level warning --follow")(logs.logs)
app.command(epilog="Example: esper top --every 2")(top.top)
app.command(epilog=f"Example: esper explain {_COMMAND} --json")(decisions.explain)
app.command(epilog=f"Example: esper replay {_COMMAND}")(decisions.replay)
app.command(epilog="Example: esper pauses --json")(pauses.pauses)
app.command(epilog="Example: esper contract-test 127.0.0.1:40123 --only 'Evaluate*'")(contract_test.contract_test)
app.command(epilog="Example: esper sign --address 127.0.0.1:40123 --seed hidden1 --operation cull --apply")(sign.sign)
for name, group in (
    ("bench", bench.app),
    ("dumps", dumps.app),
    ("keys", keys.app),
    ("pki", pki.app),
    ("plan", plan.app),
    ("policy", policy.app),
    ("reports", reports.app),
    ("serve", serve.app),
    ("training", training.app),
    ("urza", urza.app),
):
    app.add_typer(group, name=name)


def main() -> None:
    """Run the command line; the one place that reads the environment."""
    log_warnings_to_stderr()
    app(obj=dict(os.environ))
