"""Keeps tensors by key within limits of bytes: in memory, and in a file that is mapped into memory."""

from __future__ import annotations

import json
import mmap
import os
import socket
import tempfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

EPOCHS = 2
"""An entry may be dropped if it was not read while all samples could have been read twice."""


class Area:
    """An array of bytes from which pieces are lent, in memory or in a file. Memory is used from its first write on."""

    def __init__(self, size: int, file: IO[bytes] | None = None) -> None:
        if file is not None:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here; later it would be a crash
        self.size = size
        self._map = mmap.mmap(-1 if file is None else file.fileno(), size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def take(self, size: int) -> int | None:
        """Return the offset of `size` free bytes; None if there are none."""
        if self._free[size]:
            return self._free[size].pop()
        if self._end + size > self.size:
            return None
        self._end += size
        return self._end - size

    def give_back(self, offset: int, size: int) -> None:
        """Return bytes from `take`."""
        self._free[size].append(offset)

    def bytes(self, offset: int, size: int) -> Tensor:
        """Return a view of some bytes."""
        return self._bytes[offset : offset + size]


class Known(NamedTuple):
    """A kept tensor, and the block whose input it is."""

    depth: int
    value: Tensor


@dataclass(frozen=True)
class Entry:
    """The place of a tensor that is the input of block `depth`; its first byte is at `offset` in an area.

    `check` is the CRC-32 of its bytes, because another process reads them while this one may write over them.
    """

    key: str
    depth: int
    shape: tuple[int, ...]
    dtype: str
    area: int = 0
    offset: int = 0
    check: int = 0

    @property
    def size(self) -> int:
        """Bytes, rounded up so that every offset is aligned."""
        return -(-self.count // 64) * 64

    @property
    def count(self) -> int:
        """Bytes of the tensor."""
        return int(torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize)


class Store:
    """Tensors by key. A full store drops entries that were not read for two epochs, or else keeps nothing new.

    Each epoch reads every sample once, in another order. So an entry that was not read for a while is about to be read,
    and dropping the least recently used one would lose hits. An entry is dropped only after two epochs.

    Args:
        memory: bytes in memory.
        file: bytes in a file without a name, which the system deletes when the process ends, also when it is killed.

    Example:
        >>> store = Store(memory=1 << 20)
        >>> store.put("a", 3, torch.ones(2, 4))
        True
        >>> store.get("a").value.shape, store.get("b")
        (torch.Size([2, 4]), None)
    """

    def __init__(self, memory: int, file: int = 0) -> None:
        self._areas = [Area(memory)] if memory else []
        if file:
            with tempfile.TemporaryFile(prefix="safe_peft_") as opened:
                self._areas.append(Area(file, opened))
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the least recently used first
        self._last_read: dict[str, int] = {}
        self._reads, self._asked = 0, set[str]()
        self._index: IO[bytes] | None = None
        self._others: list[_Other] = []
        self.is_full = False
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def share(self, gather: Callable[[Any], list[Any]]) -> None:
        """Let the processes of one machine read each other's entries. Every process calls this before it keeps any.

        The bytes then lie in a file per process. Its name is removed as soon as all have opened it, so a killed process
        leaves nothing. `gather` returns the values that all processes pass, in the same order in all of them.
        """
        size = sum(area.size for area in self._areas)
        with tempfile.TemporaryDirectory(prefix="safe_peft_") as folder:
            own = (socket.gethostname(), folder)
            with Path(folder, "bytes").open("w+b") as opened:
                self._areas = [Area(size, opened)]
            self._index = Path(folder, "index.jsonl").open("ab", buffering=0)  # noqa: SIM115
            for host, other in gather(own):
                if host == own[0] and other != folder:
                    self._others.append(_Other(Path(other), size))
            gather(None)  # all have opened the files

    def refresh(self) -> None:
        """Read what the other processes have kept since then."""
        for other in self._others:
            other.refresh()

    def get(self, key: str) -> Known | None:
        """Return a copy of the tensor with a key; None if it is not there."""
        self._reads += 1
        self._asked.add(key)
        found = [(self._entries.get(key), self._areas), *((o.entries.get(key), [o.area]) for o in self._others)]
        entry, areas = max(found, key=lambda one: -1 if one[0] is None else one[0].depth)
        if entry is None:
            return None
        data = areas[entry.area].bytes(entry.offset, entry.size).clone()
        if _check(data) != entry.check:
            if areas is self._areas:
                self._forget(entry)
            return None
        if areas is self._areas:
            self._entries.move_to_end(key)
            self._last_read[key] = self._reads
        return Known(entry.depth, data[: entry.count].view(getattr(torch, entry.dtype)).view(entry.shape))

    def put(self, key: str, depth: int, value: Tensor) -> bool:
        """Keep a tensor, in place of an older one with this key. Returns whether there was space for it."""
        if (old := self._entries.get(key)) is not None:
            self._forget(old)
        value = value.detach().contiguous().cpu()
        entry = Entry(key, depth, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        place = self._place(entry.size)
        if place is None:
            self.is_full = True
            return False
        data = self._areas[place[0]].bytes(place[1], entry.size)
        data[: entry.count] = value.view(-1).view(torch.uint8)
        data[entry.count :] = 0
        entry = replace(entry, area=place[0], offset=place[1], check=_check(data))
        self._entries[key], self._last_read[key] = entry, self._reads
        self.bytes += entry.size
        if self._index is not None:
            self._index.write(json.dumps(asdict(entry)).encode() + b"\n")
        return True

    def drop(self, above: int = -1) -> None:
        """Drop the entries deeper than a block: something below them has changed."""
        for entry in [one for one in self._entries.values() if one.depth > above]:
            self._forget(entry)
        for other in self._others:
            other.drop(above)

    def close(self) -> None:
        """Drop all entries and free the areas. Nothing is kept from now on."""
        self._entries.clear()
        self._last_read.clear()
        self._areas.clear()
        self._others.clear()
        self.bytes = 0
        if self._index is not None:
            self._index.close()
            self._index = None

    def _place(self, size: int) -> tuple[int, int] | None:
        while True:
            for number, area in enumerate(self._areas):
                if (offset := area.take(size)) is not None:
                    return number, offset
            oldest = next(iter(self._entries.values()), None)
            if oldest is None or self._reads - self._last_read[oldest.key] <= EPOCHS * len(self._asked):
                return None
            self._forget(oldest)

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.key], self._last_read[entry.key]
        self._areas[entry.area].give_back(entry.offset, entry.size)
        self.bytes -= entry.size


class _Other:
    """The entries of another process on this machine, and its area, of `size` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        with (folder / "bytes").open("r+b") as opened:
            self.area = Area(size, opened)
        self.entries: dict[str, Entry] = {}
        self._index = (folder / "index.jsonl").open("rb")
        self._rest = b""

    def refresh(self) -> None:
        *lines, self._rest = (self._rest + self._index.read()).split(b"\n")
        for known in map(json.loads, lines):
            self.entries[known["key"]] = Entry(**known | {"shape": tuple(known["shape"])})

    def drop(self, above: int) -> None:
        self.refresh()
        self.entries = {key: entry for key, entry in self.entries.items() if entry.depth <= above}


def _check(data: Tensor) -> int:
    return zlib.crc32(memoryview(data.numpy()))  # type: ignore[arg-type]
