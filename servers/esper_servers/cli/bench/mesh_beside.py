from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from esper_rpc.errors import Unavailable
from esper_servers.cli.home import Home
from esper_servers.cli.processes import child_environ, cli_command, end, lines_until

_START_SECONDS = 60.0


@contextmanager
def mesh_beside(home: Home, environ: Mapping[str, str]) -> Iterator[None]:
    """Serve a mesh by `esper up`, so that nothing of it runs in the process that is measured; raises Unavailable."""
    command = [*cli_command(), "up", "--home", str(home.directory)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=child_environ(home, environ),
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        told = []
        for line in lines_until(process.stdout, _START_SECONDS):
            told.append(line.decode(errors="replace"))
            if line.startswith(b"wrote "):
                break
        else:
            raise Unavailable("No mesh was served:\n" + "\n".join(told))
        yield
    finally:
        end(process)
