"""How a stream of work writes and awaits the words of a mailbox: a CUDA stream, or the calling thread in its place."""

from __future__ import annotations

import ctypes
import functools
import time
from typing import Any, Protocol

import torch

from unmask.errors import ConfigError
from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_words import is_reached

_REGISTER_PORTABLE_MAPPED = 3
_WAIT_GEQ = 0
_WRITE_DEFAULT = 0


class StreamWords(Protocol):
    """Operations in the order of a stream."""

    address: int
    """Of the mailbox's first byte, where the stream's kernels see it."""

    def write(self, offset: int, value: int) -> None:
        """Store a word after everything that was queued before, whose stores are visible by then."""

    def wait(self, offset: int, value: int) -> None:
        """Hold what is queued afterwards until a word has reached a value."""


class HostWords:
    """A thread that waits itself: what a CPU host and tests use."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self.address = mailbox.memory.ctypes.data

    def write(self, offset: int, value: int) -> None:
        """See `StreamWords.write`."""
        self._mailbox.set_word(offset, value)

    def wait(self, offset: int, value: int) -> None:
        """See `StreamWords.wait`."""
        while not is_reached(self._mailbox.word(offset), value):
            time.sleep(0)


class PinnedMailbox:
    """The words of a mailbox whose pages are pinned and mapped into a GPU's address space.

    Operations go to the current stream of the device that was current at construction.

    Raises:
        ConfigError: the CUDA driver refuses, with the call and its code.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        # The context must exist before the driver is called directly.
        torch.zeros(1, device="cuda")
        host = mailbox.memory.ctypes.data
        size = mailbox.layout.num_bytes
        code = int(_runtime().cudaHostRegister(host, size, _REGISTER_PORTABLE_MAPPED))
        _check("cudaHostRegister", code)
        self._mailbox, self._host = mailbox, host
        device = ctypes.c_uint64()
        found = _driver().cuMemHostGetDevicePointer_v2(ctypes.byref(device), ctypes.c_void_p(host), 0)
        try:
            _check("cuMemHostGetDevicePointer", found)
        except ConfigError:
            self.close()
            raise
        self.address = device.value

    def write(self, offset: int, value: int) -> None:
        """See `StreamWords.write`; the operation carries a fence of its own."""
        stream = torch.cuda.current_stream().cuda_stream
        code = _driver().cuStreamWriteValue32_v2(stream, self.address + offset, value & 0xFFFFFFFF, _WRITE_DEFAULT)
        _check("cuStreamWriteValue32", code)

    def wait(self, offset: int, value: int) -> None:
        """See `StreamWords.wait`. Without a writer the stream waits for ever, and so does a synchronisation."""
        stream = torch.cuda.current_stream().cuda_stream
        code = _driver().cuStreamWaitValue32_v2(stream, self.address + offset, value & 0xFFFFFFFF, _WAIT_GEQ)
        _check("cuStreamWaitValue32", code)

    def close(self) -> None:
        """Give the pages back; the stream must be done with them."""
        _check("cudaHostUnregister", int(_runtime().cudaHostUnregister(self._host)))


@functools.cache
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    for name in ("cuStreamWaitValue32_v2", "cuStreamWriteValue32_v2"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    return library


def _runtime() -> Any:
    return torch.cuda.cudart()


def _check(call: str, code: int) -> None:
    if code:
        raise ConfigError(
            f"{call} failed with code {code}; the mailbox needs stream memory operations", field="mailbox"
        )
