"""One rank's tensors in one host buffer that has the layout of a safetensors file: copy quickly, write later.

The buffer is allocated and touched once, because the first touch of fresh memory costs ten times the copy. A save then
stops the training only for the copy; `write` touches nothing but the buffer and may run in a thread: writing and
hashing release the interpreter.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK_BYTES = 16 << 20


class HostBuffer:
    """Room for the tensors of `like` (names, dtypes and sizes; 1-D). Pinned where they lie on a GPU."""

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        order = sorted(like, key=lambda name: -like[name].element_size())  # so that all are aligned without holes
        header: dict[str, object] = {}
        at = 0
        spans = {}
        for name in order:
            tensor = like[name]
            spans[name] = (at, at + tensor.numel() * tensor.element_size())
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": spans[name]}
            at = spans[name][1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._buffer = torch.zeros(at, dtype=torch.uint8)
        if any(tensor.is_cuda for tensor in like.values()):
            self._buffer = self._buffer.pin_memory()
        self.written = 0  # bytes that `write` has handed to the file system so far
        self._views = {name: self._buffer[a:b].view(like[name].dtype) for name, (a, b) in spans.items()}

    @property
    def bytes(self) -> int:
        return len(self._head) + self._buffer.numel()

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> HostBuffer:
        """Copy the tensors, which must be those of the constructor in other values. Returns when all have arrived."""
        if tensors.keys() != self._views.keys():
            raise ValueError(f"other tensors than at the start: {sorted(tensors.keys() ^ self._views.keys())[:3]}")
        device = None
        for name, view in self._views.items():
            tensor = tensors[name].detach()
            device = tensor.device if tensor.is_cuda else device
            view.copy_(tensor.view(-1), non_blocking=True)
        if device is not None:
            torch.cuda.current_stream(device).synchronize()
        return self

    def write(self, path: Path) -> tuple[int, str]:
        """Write the file, wait for the disk, and return its size in bytes and its sha256. Raises OSError."""
        digest, self.written = hashlib.sha256(), 0
        data = memoryview(self._buffer.numpy().data)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for part in (memoryview(self._head), data):
                for first in range(0, len(part), CHUNK_BYTES):
                    chunk = part[first : first + CHUNK_BYTES]
                    digest.update(chunk)
                    while chunk:
                        count = os.write(descriptor, chunk)
                        self.written, chunk = self.written + count, chunk[count:]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return self.bytes, digest.hexdigest()
