from __future__ import annotations

from collections.abc import Sequence

ANY = "*"


class ShapeMismatch(ValueError):  # It names a verdict.
    """A shape does not fit a symbolic one."""


def bind(symbolic: Sequence[str], concrete: Sequence[int]) -> dict[str, int]:
    """Bind the names of a symbolic shape, for example ("*", "F"), to the dimensions of a site without its batch.

    A number must be equal, a name takes the dimension (the same name the same one), `*` stands for any number of them.
    """
    head, tail = _around_star(symbolic)
    if len(concrete) < len(head) + len(tail) or (ANY not in symbolic and len(concrete) != len(head)):
        raise ShapeMismatch(f"shape {list(concrete)} does not fit {list(symbolic)}")
    paired = [*zip(head, concrete, strict=False)]
    if tail:
        paired += zip(tail, concrete[-len(tail) :], strict=True)
    bound: dict[str, int] = {}
    for name, size in paired:
        expected = int(name) if name.isdecimal() else bound.setdefault(name, size)
        if expected != size:
            raise ShapeMismatch(f"shape {list(concrete)} does not fit {list(symbolic)}: {name} is {expected}")
    return bound


def fits(symbolic: Sequence[str], concrete: Sequence[int]) -> bool:
    """Whether `bind` would succeed."""
    try:
        bind(symbolic, concrete)
    except ShapeMismatch:
        return False
    return True


def _around_star(symbolic: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    if ANY not in symbolic:
        return symbolic, ()
    position = symbolic.index(ANY)
    return symbolic[:position], symbolic[position + 1 :]
