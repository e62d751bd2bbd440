from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper_rpc.proto.tamiyo.v1 import NumberArray

from .fields import write_entry, write_field

Array = NDArray[Any]
# Spelled with their byte order, so that a record is read alike on every machine.
_DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BOOL": np.dtype("?")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_KEPT = 4096


def write_arrays(number: int, arrays: Iterable[tuple[str, Array]]) -> bytes:
    """Write a map to NumberArray, as fields.py does, of arrays of float32, float64 or bool."""
    written: list[bytes] = []
    for name, array in arrays:
        before, dtype = _before_values(number, name, array.dtype, array.shape)
        written += before, array.astype(dtype, copy=False).tobytes()
    return b"".join(written)


def read_array(message: NumberArray) -> Array:
    """Read what `write_arrays` wrote; the array can be written to."""
    return np.frombuffer(message.values, _DTYPES[message.dtype]).reshape(message.shape).copy()


@functools.lru_cache(_KEPT)
def _before_values(number: int, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[bytes, np.dtype[Any]]:
    written = _NAMES[dtype.newbyteorder("<")]
    values = np.zeros(shape, _DTYPES[written]).tobytes()
    head = NumberArray(dtype=written, shape=shape).SerializeToString()
    entry = write_entry(number, name, head + write_field(NumberArray.VALUES_FIELD_NUMBER, values))
    return entry[: len(entry) - len(values)], _DTYPES[written]
