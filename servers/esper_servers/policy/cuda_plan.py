"""DensePlan on a CUDA device: a CUDA graph for each graph of a run, so that a step is two copies and one launch."""

from __future__ import annotations

import copy
import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from .compiled_plan import cells, plan_inputs
from .cuda_device import DeviceLane, Launch, VramBudget, lane_of
from .dense_plan import DensePlan
from .edge_scores import EdgeScores
from .graph import GraphInputs
from .network import Heads, PolicyNetwork

TOLERANCE = 5e-2
"""By which heads computed in bfloat16 may differ: it has 8 bits of mantissa. Measured: 1e-2."""
CELL_LIMIT = 4_000_000
"""Cells of all matrices of a graph, which take some 300 MB of the device."""
MOST_GRAPHS = 256
IDLE_SECONDS = 60.0
"""After which a graph leaves its place to another, when all are taken."""
WARM_UPS = 3
_ALIGNMENT = 64
"""Floats; a GEMM is slower on what begins elsewhere."""


class DeviceTimes(NamedTuple):
    """Where the time of an evaluation went on the device, in microseconds."""

    copy_in_us: float = 0.0
    compute_us: float = 0.0
    copy_out_us: float = 0.0


class DeviceUse(NamedTuple):
    """What a plan takes of its device."""

    name: str
    peak_bytes: int
    budget_bytes: int
    times: DeviceTimes
    """Of the last evaluation."""


class CudaPlan:
    """The same heads as PolicyNetwork, in bfloat16, of graphs that were prepared.

    Products are computed in bfloat16 (autocast), what is left of float32 ones in TensorFloat-32; sums of residuals and
    the heads are float32. On a CPU, which has no CUDA graphs, it computes the same operation by operation.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        device: torch.device,
        *,
        budget: VramBudget | None = None,
        autocast: bool = True,
        most_graphs: int = MOST_GRAPHS,
        capture: Callable[[Launch], Launch] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Copy the weights to the device."""
        self._lane = lane_of(device)
        # DensePlan shares some parameters with the network, which stays where it is.
        self._module = copy.deepcopy(DensePlan(network)).eval().requires_grad_(requires_grad=False).to(device)
        self._edge_scores = EdgeScores(network)
        self._budget = budget
        self._autocast = autocast
        self._most_graphs = most_graphs
        self._capture = capture or self._lane.capture
        self._clock = clock
        self._slots: WeakKeyDictionary[GraphInputs, _Slot] = WeakKeyDictionary()
        self._refused: WeakSet[GraphInputs] = WeakSet()
        self._missed: weakref.ref[GraphInputs] | None = None
        self._times = DeviceTimes()

    def __call__(self, inputs: GraphInputs) -> Heads | None:
        """Compute the heads of a graph, None if it is not prepared; raises RuntimeError for what the device refuses."""
        slot = self._slots.get(inputs)
        if slot is None:
            self._missed = weakref.ref(inputs)
            return None
        slot.used_at = self._clock()
        with self._lane.lock, torch.inference_mode():
            return self._evaluate(slot)

    def covers(self, inputs: GraphInputs) -> bool:
        """Whether a graph is prepared."""
        return inputs in self._slots

    @property
    def missed(self) -> GraphInputs | None:
        """The graph that was asked for last without being prepared, if it can be."""
        inputs = self._missed() if self._missed is not None else None
        return None if inputs is None or self.covers(inputs) or not self._can_take(inputs) else inputs

    def prepare(self, inputs: GraphInputs) -> None:
        """Lay a graph out on the device and capture its evaluation, if there is room; on any thread, beside steps.

        Raises RuntimeError for what the device refuses; then this graph is not tried again.
        """
        self._lane.capturer.submit(self._prepare, inputs).result()

    @property
    def use(self) -> DeviceUse:
        """What it takes of the device."""
        name = torch.cuda.get_device_name(self._lane.device) if self._lane.is_cuda else self._lane.device.type
        peak, limit = (self._budget.peak(), self._budget.limit) if self._budget else (0, 0)
        return DeviceUse(name, peak, limit, self._times)

    def _can_take(self, inputs: GraphInputs) -> bool:
        return cells(inputs) <= CELL_LIMIT and inputs not in self._refused

    def _prepare(self, inputs: GraphInputs) -> None:
        """On the one thread that adds and removes slots."""
        if self.covers(inputs) or not self._can_take(inputs) or not self._make_room():
            return
        try:
            with torch.inference_mode():
                self._slots[inputs] = self._lay_out(inputs)
        except RuntimeError:
            self._refused.add(inputs)
            raise

    def _make_room(self) -> bool:
        if len(self._slots) < self._most_graphs:
            return True
        inputs, slot = min(self._slots.items(), key=lambda item: item[1].used_at)
        if self._clock() - slot.used_at < IDLE_SECONDS:
            return False
        del self._slots[inputs]
        return True

    def _lay_out(self, inputs: GraphInputs) -> _Slot:
        with self._lane.warming():
            slot = _Slot(inputs, self._edge_scores, self._lane)
            slot.used_at = self._clock()
            tensors = slot.tensors
            for _ in range(WARM_UPS):
                heads = self._compute(tensors)
            slot.expect(heads)
            self._lane.wait()
        slot.launch = self._capture(lambda: _flat(self._compute(tensors)))
        return slot

    def _compute(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        # A cache of casts would not outlive the capture that filled it.
        kind = self._lane.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self._autocast, cache_enabled=False):
            heads: tuple[Tensor, ...] = self._module(tensors)
            return heads

    def _evaluate(self, slot: _Slot) -> Heads:
        begun, copied, computed, ended = marks = self._lane.marks
        slot.fill()
        with self._lane.serving():
            begun.record()
            slot.copy_in()
            copied.record()
            flat = slot.launch()
            computed.record()
            slot.copy_out(flat)
            ended.record()
        ended.synchronize()
        self._times = DeviceTimes(*(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)))
        return slot.heads()


class _Slot:
    """One graph on the device. What a step fills, and the heads, pass through one buffer each, pinned on the host."""

    launch: Launch
    used_at: float

    def __init__(self, inputs: GraphInputs, edge_scores: EdgeScores, lane: DeviceLane) -> None:
        laid_out, again = plan_inputs(inputs, edge_scores), plan_inputs(inputs, edge_scores)
        # What a second layout shares with the first is the graph's own memory, which a step fills.
        is_filled = [a.data_ptr() == b.data_ptr() for a, b in zip(laid_out, again, strict=True)]
        self._filled = list(itertools.compress(laid_out, is_filled))
        places = _places([tensor.shape for tensor in self._filled])
        self._staged = torch.zeros(places[-1].stop, pin_memory=lane.is_cuda)
        self._arrived = torch.zeros_like(self._staged, device=lane.device)
        self._stages = _views(self._staged, places, self._filled)
        arrivals = iter(_views(self._arrived, places, self._filled))
        self.tensors = [
            next(arrivals) if filled else tensor.to(lane.device)
            for tensor, filled in zip(laid_out, is_filled, strict=True)
        ]
        self._rows = {kind: inputs.features[kind].shape[0] for kind in ("seed", "blueprint")}
        self._is_cuda = lane.is_cuda

    def expect(self, heads: Sequence[Tensor]) -> None:
        """Make room for heads of these shapes."""
        self._shapes = [head.shape for head in heads]
        self._returned = torch.zeros(sum(head.numel() for head in heads), pin_memory=self._is_cuda)

    def fill(self) -> None:
        """Take what the step wrote."""
        for stage, tensor in zip(self._stages, self._filled, strict=True):
            stage.copy_(tensor)

    def copy_in(self) -> None:
        """Have it copied to the device."""
        self._arrived.copy_(self._staged, non_blocking=True)

    def copy_out(self, flat: Tensor) -> None:
        """Have the heads copied back."""
        self._returned.copy_(flat, non_blocking=True)

    def heads(self) -> Heads:
        """Return what came back, in memory that the next evaluation leaves alone."""
        flat = torch.split(self._returned.clone(), [shape.numel() for shape in self._shapes])
        heads = Heads(*(part.view(shape) for part, shape in zip(flat, self._shapes, strict=True)))
        seeds, blueprints = self._rows["seed"], self._rows["blueprint"]
        return heads._replace(operation=heads.operation[:seeds], blueprint=heads.blueprint[:blueprints])


def _flat(heads: Iterable[Tensor]) -> Tensor:
    return torch.cat([head.reshape(-1).float() for head in heads])


def _places(shapes: Sequence[torch.Size]) -> list[slice]:
    """Where tensors stand one after the other, each aligned."""
    rooms = [-(-shape.numel() // _ALIGNMENT) * _ALIGNMENT for shape in shapes]
    starts = itertools.accumulate(rooms, initial=0)
    return [slice(start, start + shape.numel()) for start, shape in zip(starts, shapes, strict=False)]


def _views(buffer: Tensor, places: Sequence[slice], like: Sequence[Tensor]) -> list[Tensor]:
    return [buffer[place].view(tensor.shape) for place, tensor in zip(places, like, strict=True)]
