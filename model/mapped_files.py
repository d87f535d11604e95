"""Files mapped into memory as arrays, without a descriptor each, and the bound on how many of them a process keeps.

Python's own `mmap` holds a duplicate of the descriptor for as long as a file is mapped (until 3.13, with trackfd=False), so a store
of some hundred shards would exceed the usual limit of 1024, or have to map files again for almost every row. The system call needs
the descriptor only for its own time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from model.shard_ledger import StoreError

# Linux lets a process have 65,530 mappings (vm.max_map_count); half of them are left to all else.
MAX_MAPPINGS = 1 << 15

_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class _Mapping:
    """A mapped range of memory, unmapped when the last array over it is gone: arrays keep this as their base."""

    def __init__(self, address: int, size: int) -> None:
        self._address, self._size = address, size
        self.__array_interface__ = {"version": 3, "data": (address, True), "shape": (size,), "typestr": "|u1"}

    def __del__(self, munmap: Callable[[int, int], int] = _libc.munmap) -> None:  # bound here: modules may be gone by then
        munmap(self._address, self._size)


def map_file(path: str, size: int) -> np.ndarray:
    """The bytes of a file that has `size` of them, read-only uint8 [size], read from disk as they are used.

    Raises StoreError where the file is missing, cannot be read, or has another size.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor).st_size
            if found != size:
                raise StoreError(f"{path} has {found} bytes, its ledger says {size}; tokenize the dataset again")
            if not size:
                return np.empty(0, np.uint8)
            address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            if address == _MAP_FAILED:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); bring it back, or tokenize the dataset again") from error
    return np.asarray(_Mapping(address, size))


class KeepsMapped(Protocol):
    """What holds mapped files, several under each number, and lets go of them when told."""

    def unmap(self, index: int) -> None:
        """Drops the files of number `index`."""
        ...


class MappingBudget:
    """Bounds the mappings of all holders together: over MAX_MAPPINGS, those that were made first are dropped.

    Rows come in random order, so the oldest are as good as the least recently used, and a row that finds its shard mapped does not
    pay for keeping an order. An array still in use stays valid; its memory is unmapped when it goes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[weakref.ref[KeepsMapped], int, int]] = deque()
        self._mappings = 0

    def add(self, holder: KeepsMapped, index: int, mappings: int) -> None:
        """Counts `mappings` that `holder` has just made under `index`, and drops the oldest of any holder beyond the bound."""
        with self._lock:
            self._kept.append((weakref.ref(holder), index, mappings))
            self._mappings += mappings
            while self._mappings > MAX_MAPPINGS and len(self._kept) > 1:
                reference, oldest, freed = self._kept.popleft()
                self._mappings -= freed
                found = reference()
                if found is not None:
                    found.unmap(oldest)


MAPPINGS = MappingBudget()
