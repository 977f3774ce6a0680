"""HELLO: what a draft tells of itself before the first step, and how a draft and a target are identified."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unmask.errors import PairingError, WireError
from unmask.models.dflash import DFlashDraft
from unmask.pairing.projection import Projection
from unmask.pairing.wire import DTYPES, Buffer, dtype_of, read_tensor, tensor_bytes
from unmask.types import TargetRecord

DIGEST_BYTES = 32
NO_DIGEST = bytes(DIGEST_BYTES)
"""Stands for a draft that does not record its target, and for a target that is not told apart."""

_HELLO = struct.Struct("<Q32sdIIHHBB2x")
_MAX_LAYERS = 256
_MAX_WIDTH = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A draft's own description; `projection` is to be run beside the target."""

    draft_version: int
    target_digest: bytes
    """`record_digest` of the target that the draft was trained for."""
    vocab_size: int
    block_size: int
    layer_ids: tuple[int, ...]
    """0-based target blocks whose outputs are the features, as in `DFlashConfig.target_layer_ids`."""
    projection: Projection
    takes_announcements: bool = False
    """Whether steps that are announced are queued ahead of their rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetShape:
    """What a target worker knows of itself and asks of a draft."""

    hidden_size: int
    vocab_size: int
    layer_ids: tuple[int, ...]
    target_digest: bytes = NO_DIGEST

    @property
    def hello_bytes(self) -> int:
        """Size of the largest HELLO of a draft that fits this target."""
        rows = len(self.layer_ids) * self.hidden_size + 1
        return _HELLO.size + 2 * len(self.layer_ids) + rows * self.hidden_size * torch.float32.itemsize

    def check(self, hello: Hello) -> None:
        """Refuse a draft of another target. Raises PairingError naming the first field that differs."""
        fits: list[tuple[str, object, object]] = [
            ("hidden_size", hello.projection.fc.shape[0], self.hidden_size),
            ("vocab_size", hello.vocab_size, self.vocab_size),
            ("target_layer_ids", hello.layer_ids, self.layer_ids),
        ]
        if NO_DIGEST not in (self.target_digest, hello.target_digest):
            fits.append(("target record", hello.target_digest.hex(), self.target_digest.hex()))
        for name, of_draft, of_target in fits:
            if of_draft != of_target:
                raise PairingError(
                    f"the draft has {of_draft}, the target {of_target}; serve the draft's own target", field=name
                )


def record_digest(record: TargetRecord | None) -> bytes:
    """SHA-256 of a target record; `NO_DIGEST` without one."""
    if record is None:
        return NO_DIGEST
    return hashlib.sha256(json.dumps(dataclasses.asdict(record), sort_keys=True).encode()).digest()


def draft_version(draft: DFlashDraft) -> int:
    """64-bit fingerprint of a draft's configuration and weights, as loaded: one version, one projection."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(draft.config), sort_keys=True).encode())
    for name, tensor in sorted(draft.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} ".encode())
        digest.update(tensor_bytes(tensor.cpu().contiguous()))
    return int.from_bytes(digest.digest()[:8], "little")


def hello_of(draft: DFlashDraft, version: int, record: TargetRecord | None) -> Hello:
    """The HELLO of a draft, whose projection is on the host: it is sent at any time, also while the device works."""
    config = draft.config
    projection = Projection.of(draft)
    return Hello(
        draft_version=version,
        target_digest=record_digest(record),
        vocab_size=config.vocab_size,
        block_size=config.block_size,
        layer_ids=tuple(config.target_layer_ids),
        projection=replace(projection, fc=_on_cpu(projection.fc), norm=_on_cpu(projection.norm)),
    )


def encode_hello(hello: Hello) -> list[Buffer]:
    """Payload parts of a HELLO frame."""
    fc, norm = (_on_cpu(t) for t in (hello.projection.fc, hello.projection.norm))
    header = _HELLO.pack(
        hello.draft_version,
        hello.target_digest,
        hello.projection.eps,
        hello.vocab_size,
        fc.shape[0],
        len(hello.layer_ids),
        hello.block_size,
        DTYPES.index(fc.dtype),
        int(hello.takes_announcements),
    )
    return [header, np.array(hello.layer_ids, dtype="<u2").tobytes(), tensor_bytes(fc), tensor_bytes(norm)]


def decode_hello(payload: Buffer) -> Hello:
    """Read a HELLO payload; the weights are copies. Raises WireError."""
    if len(payload) < _HELLO.size:
        raise WireError("a HELLO message is cut short")
    version, digest, eps, vocab_size, hidden, num_layers, block_size, code, flags = _HELLO.unpack_from(payload)
    dtype = dtype_of(code, DTYPES)
    if flags > 1 or not (1 <= num_layers <= _MAX_LAYERS and 1 <= hidden <= _MAX_WIDTH and block_size >= 2 and eps > 0):
        raise WireError("a HELLO message with impossible sizes")
    fc_at = _HELLO.size + 2 * num_layers
    norm_at = fc_at + num_layers * hidden * hidden * dtype.itemsize
    if len(payload) != norm_at + hidden * dtype.itemsize:
        raise WireError("the size of a HELLO message does not match its fields")
    layer_ids = np.frombuffer(payload, dtype="<u2", count=num_layers, offset=_HELLO.size)
    return Hello(
        draft_version=version,
        target_digest=digest,
        vocab_size=vocab_size,
        block_size=block_size,
        layer_ids=tuple(layer_ids.tolist()),
        projection=Projection(
            fc=read_tensor(payload, dtype, (hidden, num_layers * hidden), fc_at).clone(),
            norm=read_tensor(payload, dtype, (hidden,), norm_at).clone(),
            eps=eps,
        ),
        takes_announcements=bool(flags),
    )


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
