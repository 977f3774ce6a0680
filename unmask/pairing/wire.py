"""The draft wire: what a target worker and a draft replica say to each other, one exchange a step.

Every message is a frame: a 12-byte header (magic, protocol version, kind, payload length) and a payload of
fixed little-endian fields and raw rows. Nothing is ever unpickled or evaluated, every size is checked
before it is believed, and a message that breaks a rule raises `WireError`.

This module turns records into bytes and back; `unmask.pairing.channel` moves the bytes,
`unmask.pairing.handshake` authenticates the peers.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unmask.errors import WireError
from unmask.types import ProposalRow

PROTOCOL_VERSION = 7
MAX_MESSAGE_BYTES = 512 * 2**20
"""No frame is larger, except the draft's HELLO, whose size the target computes beforehand."""
MAX_ROWS = 8192
MAX_SPECULATIVE_TOKENS = 255

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types of projection weights; the index is the code on the wire."""
EIGHT_BIT = torch.float8_e4m3fn
"""In which feature rows may travel. They come from a norm: its range is not too small for them, and a scale of each row
would make them no more precise."""
ROW_DTYPES = (*DTYPES, EIGHT_BIT)
"""Element types of feature rows, with the same codes."""

ROW = np.dtype(
    [("request", "<u8"), ("start", "<u4"), ("num_features", "<u4"), ("last_token", "<i4"), ("num_hashes", "<u4")]
)
"""A `ProposalRow` on the wire, 24 bytes; its page hashes follow behind all rows."""

_MAGIC = b"UNMK"
_FRAME = struct.Struct("<4sBBHI")
_STEP = struct.Struct("<QQQIIIIHBBH18x")
_PROPOSALS = struct.Struct("<QQQIHH")
_REASON_BYTES = 256
_CHANCES = 2**16 - 1
"""Steps of a chance on the wire."""

FRAME_BYTES = _FRAME.size

NO_HASHES = np.empty(0, dtype="<u8")
"""Page hashes of rows without any."""

Buffer = bytes | bytearray | memoryview


class Kind(enum.IntEnum):
    """What a frame holds."""

    CHALLENGE = 1
    AUTHENTICATE = 2
    WELCOME = 3
    HELLO = 4
    STEP = 5
    PROPOSALS = 6
    REFUSAL = 7
    REPLACED = 8
    ANNOUNCE = 9
    ROWS = 10
    TOKENS = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a target worker asks in one step.

    Attributes:
        draft_version: version of the projection that made `features`.
        epoch: session of the target worker; it changes after every failure.
        number: counts the steps of an epoch; the reply repeats it.
        num_speculative_tokens: K.
        rows: `ROW` records [R], one a request, no request twice.
        features: projected feature rows [sum of `num_features`, H], in the order of `rows`.
        finished: uint64 numbers of requests that the draft may forget.
        page_hashes: uint64 hashes of context pages [sum of `num_hashes`], in the order of `rows`.
        min_chance: chance of acceptance in [0, 1] below which a token is not worth proposing, to a draft with a
            confidence head; kept in 65535ths.
    """

    draft_version: int
    epoch: int
    number: int
    num_speculative_tokens: int
    rows: np.ndarray
    features: Tensor
    finished: np.ndarray
    page_hashes: np.ndarray = field(default_factory=lambda: NO_HASHES)
    min_chance: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """The reply to a `Step`.

    Attributes:
        counts: uint8 [R], valid tokens of each row (0 is no proposal).
        tokens: int32 [R, K]; row r holds `counts[r]` proposed ids, then zeros.
    """

    draft_version: int
    epoch: int
    number: int
    counts: np.ndarray
    tokens: np.ndarray


def pack_rows(rows: Sequence[ProposalRow]) -> np.ndarray:
    """`ProposalRow` records as one `ROW` array. Raises WireError for a value out of range."""
    try:
        fields = [(r.request, r.start, r.num_features, r.last_token, len(r.page_hashes)) for r in rows]
        return np.array(fields, dtype=ROW)
    except OverflowError as error:
        raise WireError(f"a proposal row does not fit the wire: {error}") from None


def pack_hashes(rows: Sequence[ProposalRow]) -> np.ndarray:
    """Page hashes of all rows, one after another."""
    return np.array([value for row in rows for value in row.page_hashes], dtype="<u8")


def encode_frame(kind: Kind, num_bytes: int) -> bytes:
    """Header of a frame whose payload has `num_bytes` bytes."""
    return _FRAME.pack(_MAGIC, PROTOCOL_VERSION, kind, 0, num_bytes)


def decode_frame(header: Buffer, allowed: Sequence[Kind], limit: int) -> tuple[Kind, int]:
    """Kind and payload size of a frame.

    Raises:
        WireError: not this protocol, another version of it, a kind that is not `allowed`, or over `limit` bytes.
    """
    if len(header) != FRAME_BYTES:
        raise WireError(f"a frame header has {FRAME_BYTES} bytes, not {len(header)}")
    magic, version, kind, reserved, num_bytes = _FRAME.unpack(header)
    if magic != _MAGIC or reserved:
        raise WireError("the peer does not speak the draft protocol")
    if version != PROTOCOL_VERSION:
        raise WireError(f"the peer speaks protocol version {version}, not {PROTOCOL_VERSION}; run one release on both")
    if kind not in allowed:
        raise WireError(f"frame kind {kind} where {' or '.join(k.name for k in allowed)} is due")
    if num_bytes > limit:
        raise WireError(f"a {Kind(kind).name} frame of {num_bytes} bytes exceeds the limit of {limit}")
    return Kind(kind), num_bytes


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_tensor(payload: Buffer, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    """A tensor over payload bytes that the caller has checked to be there, not copied."""
    count = int(np.prod(shape))
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(payload, dtype=dtype, count=count, offset=offset).view(shape)


def dtype_of(code: int, known: Sequence[torch.dtype] = ROW_DTYPES) -> torch.dtype:
    """Element type of a wire code. Raises WireError."""
    if code >= len(known):
        raise WireError(f"unknown element type {code}")
    return known[code]


def as_rows(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Feature rows in another element type; beyond the range of `EIGHT_BIT` lies its largest value, and not NaN."""
    if dtype is EIGHT_BIT and features.dtype is not EIGHT_BIT:
        most = torch.finfo(EIGHT_BIT).max
        features = features.clamp(-most, most)
    return features.to(dtype)


def encode_step(step: Step) -> list[Buffer]:
    """Payload parts of a STEP frame; the feature rows are not copied.

    The rows start 64 bytes in, so that they stay aligned in the receiver's buffer.
    """
    features = step.features.contiguous()
    header = _STEP.pack(
        step.draft_version,
        step.epoch,
        step.number,
        len(step.rows),
        features.shape[0],
        len(step.finished),
        features.shape[1],
        step.num_speculative_tokens,
        ROW_DTYPES.index(features.dtype),
        0,
        round(step.min_chance * _CHANCES),
    )
    numbers = [array.astype("<u8").tobytes() for array in (step.page_hashes, step.finished)]
    return [header, tensor_bytes(features), step.rows.tobytes(), *numbers]


def decode_step(payload: Buffer) -> Step:
    """Read a STEP payload; the features are a view of it. Raises WireError."""
    if len(payload) < _STEP.size:
        raise WireError("a STEP message is cut short")
    version, epoch, number, num_rows, num_features, num_finished, width, k, code, reserved, chance = _STEP.unpack_from(
        payload
    )
    dtype = dtype_of(code)
    if reserved or not 1 <= k <= MAX_SPECULATIVE_TOKENS or num_rows > MAX_ROWS:
        raise WireError(f"a STEP message asks for K = {k} in {num_rows} rows")
    rows_at = _STEP.size + num_features * width * dtype.itemsize
    hashes_at = rows_at + num_rows * ROW.itemsize
    if len(payload) < hashes_at:
        raise WireError("the size of a STEP message does not match its fields")
    rows = np.frombuffer(payload, dtype=ROW, count=num_rows, offset=rows_at)
    num_hashes = int(rows["num_hashes"].sum(dtype=np.uint64))
    if len(payload) != hashes_at + (num_hashes + num_finished) * 8:
        raise WireError("the size of a STEP message does not match its fields")
    if int(rows["num_features"].sum(dtype=np.uint64)) != num_features:
        raise WireError("the rows of a STEP message do not add up to its features")
    if len(np.unique(rows["request"])) != num_rows:
        raise WireError("a STEP message names a request twice")
    return Step(
        draft_version=version,
        epoch=epoch,
        number=number,
        num_speculative_tokens=k,
        rows=rows,
        features=read_tensor(payload, dtype, (num_features, width), _STEP.size),
        page_hashes=np.frombuffer(payload, dtype="<u8", count=num_hashes, offset=hashes_at),
        finished=np.frombuffer(payload, dtype="<u8", count=num_finished, offset=hashes_at + num_hashes * 8),
        min_chance=chance / _CHANCES,
    )


def encode_proposals(proposals: Proposals) -> list[Buffer]:
    """Payload parts of a PROPOSALS frame."""
    num_rows, k = proposals.tokens.shape
    header = _PROPOSALS.pack(proposals.draft_version, proposals.epoch, proposals.number, num_rows, k, 0)
    return [header, proposals.counts.astype("u1").tobytes(), proposals.tokens.astype("<i4").tobytes()]


def decode_proposals(payload: Buffer, step: Step, vocab_size: int) -> Proposals:
    """Read the reply to `step`.

    Raises:
        WireError: malformed, the reply to another step or session, or with an id outside the vocabulary.
    """
    if len(payload) < _PROPOSALS.size:
        raise WireError("a PROPOSALS message is cut short")
    version, epoch, number, num_rows, k, _ = _PROPOSALS.unpack_from(payload)
    if (version, epoch, number) != (step.draft_version, step.epoch, step.number):
        raise WireError("proposals of another version, session or step")
    if (num_rows, k) != (len(step.rows), step.num_speculative_tokens):
        raise WireError(f"{num_rows} x {k} proposals for {len(step.rows)} x {step.num_speculative_tokens}")
    if len(payload) != _PROPOSALS.size + num_rows + 4 * num_rows * k:
        raise WireError("the size of a PROPOSALS message does not match its fields")
    counts = np.frombuffer(payload, dtype="u1", count=num_rows, offset=_PROPOSALS.size)
    tokens = np.frombuffer(payload, dtype="<i4", count=num_rows * k, offset=_PROPOSALS.size + num_rows)
    if num_rows and (counts.max() > k or tokens.min() < 0 or tokens.max() >= vocab_size):
        raise WireError("a proposal outside the vocabulary")
    return Proposals(
        draft_version=version, epoch=epoch, number=number, counts=counts, tokens=tokens.reshape(num_rows, k)
    )


def encode_refusal(reason: str) -> list[Buffer]:
    """Payload parts of a REFUSAL frame: the last word before the sender hangs up."""
    return [reason.encode("ascii", "replace")[:_REASON_BYTES]]


def decode_refusal(payload: Buffer) -> str:
    """The peer's reason, printable whatever it sent."""
    return "".join(c if c.isprintable() else "?" for c in bytes(payload[:_REASON_BYTES]).decode("ascii", "replace"))
