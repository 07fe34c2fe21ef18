"""Tensors by key within a budget of memory; what is beyond it lies in a file without a name."""

import io
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from blockpruner.errors import MachineError

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class _Place:
    """Where in the file a tensor lies, and what it was."""

    start: int
    size: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Spill(Generic[K]):
    """Holds tensors until they are taken; up to `memory` bytes of them in memory (None: all), the rest in a file.

    Whoever walks over many in the same order again and again is served best when what came first stays, so nothing
    that is in memory is ever moved out. The file is in `folder`, or where temporary files go; it has no name, so the
    system removes it when this process ends, however it ends. spilled: bytes written so far; most: bytes held in memory
    at most. MachineError where the disk is full. Tensors come back with the same bits. Used as a context, which ends
    with everything let go.
    """

    def __init__(self, memory: int | None = None, folder: Path | None = None) -> None:
        self.memory, self.spilled, self.most = memory, 0, 0
        self._folder = folder
        self._held: dict[K, Tensor] = {}
        self._used = 0
        self._places: dict[K, _Place] = {}
        self._free: dict[int, list[int]] = {}
        self._end = 0
        self._file: io.FileIO | io.BytesIO = io.BytesIO()  # takes nothing; a real one is opened when it is needed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        self._places.clear()
        self._file.close()

    def __contains__(self, key: object) -> bool:
        return key in self._held or key in self._places

    def put(self, key: K, tensor: Tensor) -> None:
        """Hold `tensor`, which nobody changes any more, under a key that holds nothing."""
        if self.memory is None or self._used + tensor.nbytes <= self.memory:
            self._held[key] = tensor
            self._used += tensor.nbytes
            self.most = max(self.most, self._used)
        else:
            self._write(key, tensor)

    def get(self, key: K) -> Tensor:
        """What `put` was given."""
        return self._held[key] if key in self._held else self._read(self._places[key])

    def pop(self, key: K) -> Tensor:
        """What `put` was given, which is then held no longer."""
        if key in self._held:
            tensor = self._held.pop(key)
            self._used -= tensor.nbytes
            return tensor
        place = self._places.pop(key)
        tensor = self._read(place)
        self._free.setdefault(place.size, []).append(place.start)
        return tensor

    def _write(self, key: K, tensor: Tensor) -> None:
        size = tensor.nbytes
        if not self.spilled:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 (closed on leaving)
        free = self._free.get(size)
        start = free.pop() if free else self._end
        self._end = max(self._end, start + size)
        left = _bytes(tensor.detach().cpu().contiguous()).numpy().data
        try:
            self._file.seek(start)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise MachineError(
                f"states of the model do not fit on the disk: {error}",
                fix="give more --memory, or free some disk space",
            ) from error
        self._places[key] = _Place(start, size, tensor.shape, tensor.dtype, tensor.device)
        self.spilled += size

    def _read(self, place: _Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        left = _bytes(tensor).numpy().data
        self._file.seek(place.start)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise MachineError("a state of the model is gone from the disk", fix="run the same command again")
            left = left[count:]
        return tensor.to(place.device)


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, in place."""
    return tensor.reshape(-1).view(torch.uint8)
