"""Mutual authentication by a shared secret: HMAC-SHA-256 over both sides' nonces.

    draft  -> CHALLENGE(draft nonce)
    target -> AUTHENTICATE(target nonce, HMAC(secret, "target" | nonces))
    draft  -> WELCOME(HMAC(secret, "draft" | nonces))

The secret never travels, the two labels keep a proof from being reflected, and nothing but these three small
frames is read from a peer that has not proved itself. It keeps strangers out; it does not encrypt. Feature
rows say much about the prompts, so the wire belongs inside a private network.
"""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

from unmask.errors import ConfigError, WireError
from unmask.pairing.channel import Channel
from unmask.pairing.wire import PROTOCOL_VERSION, Buffer, Kind

NONCE_BYTES = 32
PROOF_BYTES = 32
MIN_SECRET_BYTES = 16


def read_secret(path: str | Path) -> bytes:
    """Read a shared secret, white space around it dropped. Raises ConfigError for a missing or short one."""
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}", field="secret_file") from None
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"'{path}' holds {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed; "
            "write one with `openssl rand -hex 32`",
            field="secret_file",
        )
    return secret


def authenticate_as_target(channel: Channel, secret: bytes, deadline: float) -> None:
    """Prove the secret to a draft and have it proved. Raises WireError, OSError."""
    _, challenge = channel.receive([Kind.CHALLENGE], NONCE_BYTES, deadline)
    nonces = bytes(_exactly(challenge, NONCE_BYTES)) + secrets.token_bytes(NONCE_BYTES)
    channel.send(Kind.AUTHENTICATE, [nonces[NONCE_BYTES:], _proof(secret, b"target", nonces)], deadline)
    _, proof = channel.receive([Kind.WELCOME], PROOF_BYTES, deadline)
    _verify(proof, _proof(secret, b"draft", nonces))


def authenticate_as_draft(channel: Channel, secret: bytes, deadline: float) -> None:
    """Demand the secret of a target, then prove it. Raises WireError, OSError."""
    own = secrets.token_bytes(NONCE_BYTES)
    channel.send(Kind.CHALLENGE, [own], deadline)
    _, answer = channel.receive([Kind.AUTHENTICATE], NONCE_BYTES + PROOF_BYTES, deadline)
    answer = _exactly(answer, NONCE_BYTES + PROOF_BYTES)
    nonces = own + bytes(answer[:NONCE_BYTES])
    _verify(answer[NONCE_BYTES:], _proof(secret, b"target", nonces))
    channel.send(Kind.WELCOME, [_proof(secret, b"draft", nonces)], deadline)


def _proof(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, b"unmask draft wire %d " % PROTOCOL_VERSION + role + nonces, "sha256")


def _verify(proof: Buffer, expected: bytes) -> None:
    if not hmac.compare_digest(bytes(proof), expected):
        raise WireError("the peer does not know the shared secret; give both sides the same secret file")


def _exactly(payload: memoryview, num_bytes: int) -> memoryview:
    if len(payload) != num_bytes:
        raise WireError(f"a handshake message of {len(payload)} bytes, not {num_bytes}")
    return payload
