"""Tensors as files in the safetensors format, written and read as a stream with their SHA-256."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

READ_BYTES: Final = 8 * 2**20
WRITE_BYTES: Final = 64 * 2**20
"""A write waits for the disk: 8 MiB at a time took three times as long, and each tensor by itself longer still."""
_MOST_AT_ONCE = 512
_LENGTH_BYTES = 8
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def can_hold(tensor: Tensor) -> bool:
    """Whether a file can hold a tensor like this one."""
    return tensor.dtype in _NAMES and tensor.layout == torch.strided


def chunks(tensors: Mapping[str, Tensor]) -> Iterator[list[memoryview]]:
    """Yield what to write at once of a file that holds these tensors; those on a device are copied meanwhile only."""
    gathered: list[memoryview] = []
    for content in _contents(tensors):
        gathered.append(content)
        if sum(map(len, gathered)) >= WRITE_BYTES or len(gathered) == _MOST_AT_ONCE:
            yield gathered
            gathered = []
    if gathered:
        yield gathered


def read(path: Path, size_bytes: int, sha256: str, on_chunk: Callable[[], None]) -> dict[str, Tensor]:
    """Read a file of this size and digest; `on_chunk` is called now and then, and may raise.

    Raises:
        OSError: When it cannot be read.
        ValueError: When it is not the file that was written; the text is a stable word.
    """
    content = torch.empty(size_bytes, dtype=torch.uint8)
    if _read_into(path, _view_of(content), on_chunk) != sha256:
        raise ValueError("checksum_mismatch")
    try:
        return parse(content)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError("unreadable") from error


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a file that holds these tensors."""
    return b"".join(content for gathered in chunks(tensors) for content in gathered)


def parse(content: Tensor) -> dict[str, Tensor]:
    """Return the tensors in the content of a file; they share its memory."""
    return dict(_tensors_in(content))


def _contents(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    # Wide elements first keep every tensor aligned to its own.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    yield memoryview(_header(ordered))
    for _, tensor in ordered:
        content = _view_of(_bytes_of(tensor))
        for start in range(0, len(content), WRITE_BYTES):
            yield content[start : start + WRITE_BYTES]


def _header(ordered: list[tuple[str, Tensor]]) -> bytes:
    described, start = {}, 0
    for name, tensor in ordered:
        end = start + tensor.nbytes
        described[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def _view_of(content: Tensor) -> memoryview:
    view: memoryview = content.numpy().data
    return view


def _read_into(path: Path, content: memoryview, on_chunk: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        start = 0
        while start < len(content):
            on_chunk()
            count = file.readinto(content[start : start + READ_BYTES])
            if not count:
                raise ValueError("size_mismatch")
            digest.update(content[start : start + count])
            start += count
    return digest.hexdigest()


def _tensors_in(content: Tensor) -> Iterator[tuple[str, Tensor]]:
    begin = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES].numpy().tobytes(), "little")
    described: dict[str, Any] = json.loads(content[_LENGTH_BYTES:begin].numpy().tobytes())
    for name, each in described.items():
        dtype, (start, end) = _DTYPES[each["dtype"]], each["data_offsets"]
        if not 0 <= start <= end <= len(content) - begin or end - start != math.prod(each["shape"]) * dtype.itemsize:
            raise ValueError(name)
        yield name, content[begin + start : begin + end].view(dtype).reshape(each["shape"])
