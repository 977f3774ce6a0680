"""API keys: hashed at rest, several at a time, replaced without a restart."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app import errors

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ping"})
"""Probes of balancers and orchestrators, which carry no key."""

_ENTRY = re.compile(r"(?:[A-Za-z0-9._-]+:)?([0-9a-f]{64})")


def hash_key(key: str) -> str:
    """What the key file holds for a key: its SHA-256 in hex. Keys are random, so that no salt is needed."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class KeyFile:
    """The accepted keys: one `sha256` or `name:sha256` a line, `#` begins a comment.

    The file is read again when it changes; replace it by a rename. A missing or malformed file accepts no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._hashes: tuple[str, ...] = ()

    def accepts(self, key: str) -> bool:
        """Whether the key is in the file. The time taken does not depend on where a mismatch is."""
        self._refresh()
        offered = hash_key(key)
        return sum(hmac.compare_digest(offered, known) for known in self._hashes) > 0

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return
            self._hashes = _parse(self._path.read_text())
            self._stamp = stamp
        except (OSError, ValueError) as error:
            if self._hashes or self._stamp is None:
                logger.error("no API key is accepted: %s", error)
            self._hashes = ()
            self._stamp = (0, 0, 0)


class RequireKey:
    """ASGI middleware that answers 401 on every path but `OPEN_PATHS` without an accepted key.

    Requests go on with `request.state.api_key`, the hash of their key, by which clients are told apart.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        key = _bearer(scope)
        if scope["path"] in OPEN_PATHS or self._keys.accepts(key):
            scope.setdefault("state", {})["api_key"] = hash_key(key)
            await self._app(scope, receive, send)
            return
        await errors.unauthorized().response()(scope, receive, send)


def api_key(request: Request) -> str:
    """By which requests of one key are told from others; the same for all where no key is asked for."""
    return getattr(request.state, "api_key", "")


def _bearer(scope: Scope) -> str:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _parse(text: str) -> tuple[str, ...]:
    hashes = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"line {number} of the key file is not 'name:sha256'")
        hashes.append(match.group(1))
    return tuple(hashes)
