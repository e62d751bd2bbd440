"""The hooks on one seed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .projection import Projection, part_as_it_lies
from .spans import MemoryMap, address_of, extent_of, span_of


class Found(NamedTuple):
    """What one step has shown of a seed."""

    dot: float
    """Of what host and seed gave to memory that both write to; exactly 0 where they share none."""
    problem: str
    """Why this could not be measured, empty when it could."""


class _Place:
    """The memory of one parameter of the seed. Both sides are projected only where both were seen to write."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.by_others: dict[int, RemovableHandle] = {}
        """Hooks on the host's parameters that lie here."""
        self.is_reached = False
        """A gradient came from outside of the seed's own backward pass."""
        self.is_covered = False
        """The host has a parameter here."""
        self._lies = (0, 0)
        self._host, self._seed = Projection(0), Projection(0)
        self.find()

    @property
    def is_shared(self) -> bool:
        return self.is_reached or self.is_covered

    def find(self) -> None:
        """See where the parameter lies, which may be elsewhere than before."""
        lies = (self.parameter.data_ptr(), extent_of(self.parameter))
        if lies != self._lies:
            self._lies, self._host, self._seed = lies, Projection(lies[1]), Projection(lies[1])

    def add(self, gradient: Tensor, of: Tensor, *, by_host: bool) -> None:
        if of.element_size() != self.parameter.element_size():
            raise TypeError(f"{of.dtype} and {self.parameter.dtype} lie in the same memory")
        at = (of.data_ptr() - self._lies[0]) // of.element_size()
        side = self._host if by_host else self._seed
        first, last = side.window
        flat, begins = part_as_it_lies(gradient.detach(), of, first - at, last - at)
        side.add(flat, at + begins)

    def take_dot(self) -> Tensor | None:
        host, seed = self._host.take(), self._seed.take()
        return None if host is None or seed is None else host @ seed


class SeedWatch:
    """Collects what a seed and its host give to the same memory, backward pass by backward pass.

    A hook on a leaf gets what one backward pass adds to its gradient, before it is added, and once for each graph. The
    backward pass of a seed is a graph of its own, so its part is told from that of the host even where both write to
    one and the same parameter, whatever has been accumulated and whenever gradients are zeroed.
    """

    def __init__(self, parameters: Sequence[Tensor], on_backward: Callable[[], object]) -> None:
        """Hook these parameters; `on_backward` is called in each backward pass that the seed takes part in."""
        self._on_backward = on_backward
        self._places = [_Place(parameter) for parameter in parameters]
        self._handles = [_put(place.parameter, self._hook(place)) for place in self._places]
        self._seen: tuple[MemoryMap, list[int]] | None = None
        """The host and where the seed lay, at the last look."""
        self._is_own = self._has_run = self._has_arrived = False
        self._problem = ""

    @property
    def covered(self) -> list[Tensor]:
        """The parameters of the seed that lie in memory of the host."""
        return [place.parameter for place in self._places if place.is_covered]

    @contextlib.contextmanager
    def own_backward(self) -> Iterator[None]:
        """Take what arrives meanwhile for the seed's own."""
        self._is_own = self._has_run = True
        try:
            self._on_backward()
            yield
        finally:
            self._is_own = False

    def look(self, host: MemoryMap) -> None:
        """See which parameters of the host lie where the seed's do, and hook them."""
        seen = (host, [address_of(place.parameter) for place in self._places])
        if seen == self._seen:
            return
        self._seen = seen
        for place in self._places:
            span = span_of(place.parameter)
            over = list(host.over(span)) if span is not None else []
            if over or place.is_covered:
                place.find()
                place.is_covered = bool(over)
                self._hook_others(place, {id(each): each for each in over if each is not place.parameter})

    def take(self) -> Found | None:
        """Return what was found since the last call, None when the seed took part in no backward pass."""
        has_run, has_arrived, problem = self._has_run, self._has_arrived, self._problem
        self._has_run, self._has_arrived, self._problem = False, False, ""
        dots = [dot for place in self._places if place.is_shared and (dot := place.take_dot()) is not None]
        if not has_run and not problem:
            return None
        if self._places and not has_arrived:
            problem = problem or "no gradient arrived"
        return Found(sum(float(dot) for dot in dots), problem)

    def end(self) -> None:
        """Take the hooks off."""
        for place in self._places:
            self._hook_others(place, {})
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook_others(self, place: _Place, wanted: dict[int, Tensor]) -> None:
        for gone in place.by_others.keys() - wanted.keys():
            place.by_others.pop(gone).remove()
        for fresh in wanted.keys() - place.by_others.keys():
            place.by_others[fresh] = _put(wanted[fresh], self._hook(place, of=wanted[fresh]))

    def _hook(self, place: _Place, of: Tensor | None = None) -> Callable[[Tensor], None]:
        # The tensor holds its hook: neither keeps the other.
        watch, where = weakref.ref(self), weakref.ref(place)
        other = weakref.ref(of) if of is not None else None

        def arrived(gradient: Tensor) -> None:
            known, here = watch(), where()
            tensor = other() if other is not None else (here.parameter if here is not None else None)
            if known is not None and here is not None and tensor is not None:
                known._note(here, gradient, tensor, is_own=known._is_own and other is None)

        return arrived

    def _note(self, place: _Place, gradient: Tensor, of: Tensor, *, is_own: bool) -> None:
        self._has_arrived |= is_own
        place.is_reached |= not is_own and of is place.parameter
        if not place.is_shared:
            return
        try:
            with torch.no_grad():
                place.add(gradient, of, by_host=not is_own)
        except Exception as error:  # noqa: BLE001  # It would end the user's backward pass.
            self._problem = str(error)


def _put(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = tensor.register_hook(hook)  # type: ignore[no-untyped-call]  # Untyped in torch.
    return handle
