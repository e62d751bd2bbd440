"""Lay this environment over another: what is missing here is imported from there."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


def main(base: Path) -> None:
    beneath = sysconfig.get_path("purelib", vars={"base": str(base.resolve())})
    here = Path(sysconfig.get_path("purelib"))
    # Lines that import are executed; addsitedir reads the .pth files of the editable install as well.
    (here / "zz_layer.pth").write_text(f"import site; site.addsitedir({beneath!r})\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
