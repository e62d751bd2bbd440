from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper_rpc.proto.tamiyo.v1 import NumberArray

Array = NDArray[Any]
# Spelled with their byte order, so that a record is read alike on every machine.
_DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BOOL": np.dtype("?")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_array(array: Array) -> NumberArray:
    """Write an array of float32, float64 or bool."""
    name = _NAMES[array.dtype.newbyteorder("<")]
    return NumberArray(dtype=name, shape=array.shape, values=array.astype(_DTYPES[name], copy=False).tobytes())


def read_array(message: NumberArray) -> Array:
    """Read what `write_array` wrote; the array can be written to."""
    return np.frombuffer(message.values, _DTYPES[message.dtype]).reshape(message.shape).copy()


def write_arrays(arrays: Mapping[str, Array]) -> dict[str, NumberArray]:
    """Write arrays by name."""
    return {name: write_array(array) for name, array in arrays.items()}
