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


class Ledger(Generic[K]):
    """Which tensors, by key and bytes, are in memory, where only `memory` bytes of them may be (None: all).

    What is in memory is never moved out. most: bytes held in memory at most; spilled: bytes that had no room by now.
    """

    def __init__(self, memory: int | None = None) -> None:
        self.memory, self.used, self.most, self.spilled = memory, 0, 0, 0
        self._held: dict[K, int] = {}

    def put(self, key: K, size: int) -> bool:
        """Whether there is room for it, which is taken then."""
        if self.memory is not None and self.used + size > self.memory:
            self.spilled += size
            return False
        self._held[key] = size
        self.used += size
        self.most = max(self.most, self.used)
        return True

    def pop(self, key: K) -> None:
        """It is held no longer; no matter where it was."""
        self.used -= self._held.pop(key, 0)


class Spill(Generic[K]):
    """Holds tensors until they are taken; up to `memory` bytes of them in memory (None: all), the rest in a file.

    Whoever walks over many in the same order again and again is served best when what came first stays, as the ledger
    has it. The file is in `folder`, or where temporary files go; it has no name, so the system removes it when this
    process ends, however it ends. MachineError where the disk is full. Tensors come back with the same bits. Used as a
    context it is closed at the end.
    """

    def __init__(
        self,
        memory: int | None = None,
        folder: Path | None = None,
        fix: str = "give more --memory, free some disk space, or name another folder in TMPDIR",
    ) -> None:
        self.ledger = Ledger[K](memory)
        self._fix = fix
        self._folder = folder
        self._held: dict[K, Tensor] = {}
        self._places: dict[K, _Place] = {}
        self._free: dict[int, list[int]] = {}
        self._end = 0
        self._file: io.FileIO | io.BytesIO = io.BytesIO()  # takes nothing; a real one is opened when it is needed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let everything go."""
        self._held.clear()
        self._places.clear()
        self._file.close()

    def __contains__(self, key: object) -> bool:
        return key in self._held or key in self._places

    def put(self, key: K, tensor: Tensor) -> None:
        """Hold `tensor`, which nobody changes any more, under a key that holds nothing."""
        if self.ledger.put(key, tensor.nbytes):
            self._held[key] = tensor
        else:
            self._write(key, tensor)

    def get(self, key: K) -> Tensor:
        """What `put` was given."""
        return self._held[key] if key in self._held else self._read(self._places[key])

    def pop(self, key: K) -> Tensor:
        """What `put` was given, which is then held no longer."""
        self.ledger.pop(key)
        if key in self._held:
            return self._held.pop(key)
        place = self._places.pop(key)
        tensor = self._read(place)
        self._free.setdefault(place.size, []).append(place.start)
        return tensor

    def _write(self, key: K, tensor: Tensor) -> None:
        size = tensor.nbytes
        if isinstance(self._file, io.BytesIO):
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
            raise MachineError(f"states of the model do not fit on the disk: {error}", fix=self._fix) from error
        self._places[key] = _Place(start, size, tensor.shape, tensor.dtype, tensor.device)

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
