"""`esper bench`: figures of this machine, one JSON object each."""

from __future__ import annotations

import typer

from esper_servers.cli.console import Commands

from . import (
    apply,
    blend,
    ddp,
    echo,
    emergency,
    fleet,
    germinate,
    growth,
    isolation,
    optim,
    overhead,
    overload,
    rollback,
    rotate,
    runtime,
    soak,
    start,
    step,
    urza,
)

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Measure the mesh on this machine.")
app.command("apply", epilog="Example: esper bench apply --json")(apply.apply)
app.command("blend", epilog="Example: esper bench blend --seconds 18 --json")(blend.blend)
app.command("ddp", epilog="Example: esper bench ddp --ranks 2 --json")(ddp.ddp)
app.command("echo", epilog="Example: esper bench echo --json")(echo.echo)
app.command("echo-server", hidden=True, epilog="Example: esper bench echo-server --home ~/.esper")(echo.echo_server)
app.command("constant-server", hidden=True, epilog="Example: esper bench constant-server")(runtime.constant_server)
app.command("emergency", epilog="Example: esper bench emergency --processes 8 --json")(emergency.emergency)
app.command("fleet", epilog="Example: esper bench fleet --seconds 5 --json")(fleet.fleet)
app.command("germinate", epilog="Example: esper bench germinate --json")(germinate.germinate)
app.command("growth", epilog="Example: esper bench growth --plot growth.svg --json")(growth.growth)
app.command("isolation", epilog="Example: esper bench isolation --model cnn_25m --json")(isolation.isolation)
app.command("overhead", epilog="Example: esper bench overhead --step-ms 50 --json")(overhead.overhead)
app.command("optim", epilog="Example: esper bench optim --json")(optim.optim)
app.command("overload", epilog="Example: esper bench overload --seconds 10 --json")(overload.overload)
app.command("rollback", epilog="Example: esper bench rollback --parameters 25 --json")(rollback.rollback)
app.command("rotate", epilog="Example: esper bench rotate --certificates 10 --keys 5 --json")(rotate.rotate)
app.command("soak", epilog="Example: esper bench soak --steps 1000000 --json")(soak.soak)
app.command("start", epilog="Example: esper bench start --json")(start.start)
app.command("runtime", epilog="Example: esper bench runtime --json")(runtime.runtime)
app.command("step", epilog="Example: esper bench step --steps 1000 --json")(step.step)
app.command("urza", epilog="Example: esper bench urza --json")(urza.urza)
