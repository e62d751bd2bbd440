"""Calling what AOTInductor compiled through its C interface, with or without the interpreter's lock.

torch's own loader keeps the lock while the code runs, so that a server could not even refuse anyone meanwhile. The
interface is `torch/csrc/inductor/aoti_runtime/interface.h`.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
import weakref
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from ctypes import byref, c_bool, c_char_p, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_aoti: Any = torch._C._aoti  # torch is pinned.


class _Constant(ctypes.Structure):
    """AOTInductorConstantMapEntry."""

    _fields_ = (("name", c_char_p), ("handle", c_void_p))


_SIGNATURES: dict[str, list[Any]] = {
    "AOTInductorGetLastError": [c_void_p],
    "AOTInductorModelContainerCreateWithDevice": [c_void_p, c_size_t, c_char_p, c_char_p],
    "AOTInductorModelContainerDelete": [c_void_p],
    "AOTInductorModelContainerGetNumConstants": [c_void_p, c_void_p],
    "AOTInductorModelContainerGetConstantName": [c_void_p, c_size_t, c_void_p],
    "AOTInductorModelContainerGetConstantOriginalFQN": [c_void_p, c_size_t, c_void_p],
    "AOTInductorModelContainerGetNumInputs": [c_void_p, c_void_p],
    "AOTInductorModelContainerGetNumOutputs": [c_void_p, c_void_p],
    "AOTInductorModelContainerUpdateConstantBufferPairs": [c_void_p, c_void_p, c_size_t, c_bool, c_bool],
    "AOTInductorModelContainerRun": [c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p],
}

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = c_void_p, [ctypes.py_object, c_char_p]
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype, _capsule_of.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]


class NativePackage:
    """A compiled plan with the weights of one policy; one call at a time."""

    def __init__(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Load the code once a process and copy the weights.

        Raises BadZipFile, OSError, KeyError for a weight that is missing, RuntimeError for what the code refuses.
        """
        status = path.stat()
        self._library = _library(path, status.st_mtime_ns, status.st_size)
        self._container = c_void_p()
        self._check(self._library.AOTInductorModelContainerCreateWithDevice(byref(self._container), 1, b"cpu", None))
        weakref.finalize(self, self._library.AOTInductorModelContainerDelete, self._container)
        self._input_count, self._output_count = self._count("Inputs"), self._count("Outputs")
        self._load(weights)
        self._keeping_gil, self._releasing_gil = _run_of(self._library)

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """Compute the outputs; no other thread gets between, which would cost up to a switch interval."""
        return self._run(self._keeping_gil, tensors)

    def compute_beside(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """Compute the same while other threads use the interpreter."""
        return self._run(self._releasing_gil, tensors)

    def _run(self, run: Any, tensors: list[Tensor]) -> Sequence[Tensor]:
        if len(tensors) != self._input_count:
            raise RuntimeError(f"the code takes {self._input_count} tensors, not {len(tensors)}")
        inputs = (c_void_p * self._input_count)(*_handles(tensors))
        outputs = (c_void_p * self._output_count)()
        self._check(run(self._container, inputs, self._input_count, outputs, self._output_count, None, None))
        return _tensors(outputs)

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        count = self._count("Constants")
        names = [self._name("Name", index) for index in range(count)]
        tensors = [weights[self._name("OriginalFQN", index).decode()].contiguous() for index in range(count)]
        handles = _handles(tensors)
        constants = (_Constant * count)(*map(_Constant, names, handles))
        # Into the constants in use, every one of them.
        update = self._library.AOTInductorModelContainerUpdateConstantBufferPairs
        try:
            self._check(update(self._container, constants, count, False, True))
        finally:
            _tensors(handles)  # Only lent: taken back, they are freed.

    def _count(self, what: str) -> int:
        number = c_size_t()
        self._check(self._library[f"AOTInductorModelContainerGetNum{what}"](self._container, byref(number)))
        return number.value

    def _name(self, what: str, index: int) -> bytes:
        name = c_char_p()
        call = self._library[f"AOTInductorModelContainerGetConstant{what}"]
        self._check(call(self._container, index, byref(name)))
        return name.value or b""

    def _check(self, code: int) -> None:
        if code:
            message = c_char_p()
            self._library.AOTInductorGetLastError(byref(message))
            raise RuntimeError((message.value or b"the compiled code failed").decode(errors="replace"))


def _handles(tensors: Sequence[Tensor]) -> list[int]:
    """New handles, which whoever gets them owns."""
    return [_pointer_of(capsule, None) for capsule in _aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)]


def _tensors(handles: Iterable[Any]) -> list[Tensor]:
    """The tensors of handles that are owned here."""
    capsules = [_capsule_of(handle, None, None) for handle in handles]
    return list(_aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules))


@functools.lru_cache(maxsize=4)
def _library(path: Path, _changed_ns: int, _size: int) -> ctypes.PyDLL:
    """The code of a package; the archive's checksum is verified, since a cut library would crash the process."""
    with zipfile.ZipFile(path) as archive, tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so") as file:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        file.write(archive.read(name))
        file.flush()
        library = ctypes.PyDLL(file.name)
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = c_int32
    return library


def _run_of(library: ctypes.PyDLL) -> tuple[Any, Any]:
    """The call that keeps the interpreter's lock, and the one that releases it."""
    keeping = library.AOTInductorModelContainerRun
    address = ctypes.cast(keeping, c_void_p).value or 0
    arguments = _SIGNATURES["AOTInductorModelContainerRun"]
    return keeping, ctypes.CFUNCTYPE(c_int32, *arguments)(address)
