"""Check the installed wheel: its names, its imports without the extras, and that it works without torch."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import PurePosixPath

EXPECTED = {"esper_rpc", "esper_servers", "esper_client"}


def top_level_names() -> set[str]:
    """Name what the distribution puts beside other packages."""
    files = importlib.metadata.files("esper-rpc") or []
    firsts = {PurePosixPath(str(f)).parts[0] for f in files}
    return {name for name in firsts if not name.endswith(".dist-info") and name != ".."}


def main() -> None:
    """Fail with a sentence on the first thing that is wrong."""
    import esper_client
    import esper_rpc

    assert top_level_names() == EXPECTED, f"the wheel's top-level names are {top_level_names()}"
    assert "site-packages" in (esper_client.__file__ or ""), "the checkout was tested, not the wheel"
    assert "torch" not in sys.modules, "importing the SDK loaded torch"
    try:
        esper_client.attach(object(), object())
    except esper_rpc.errors.EsperError as error:
        assert "esper-rpc[trainer]" in str(error), f"the error does not name the extra: {error}"
    else:
        raise AssertionError("attach without the trainer extra must say so")
    print("wheel: names, imports and the error without extras are right")


if __name__ == "__main__":
    main()
