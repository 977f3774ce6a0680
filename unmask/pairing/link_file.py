"""The link file: how a target worker finds its draft. Small JSON, replaced atomically by whoever places the draft."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from unmask.errors import ConfigError, nearest
from unmask.files import write_json
from unmask.pairing.channel import parse_address
from unmask.pairing.wire import MAX_SPECULATIVE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """One target worker's link to its draft. Raises ConfigError for impossible values."""

    address: str | None
    """`host:port` or `unix:/path`; None while no draft is placed."""
    secret_file: str
    further_addresses: tuple[str, ...] = ()
    """More drafts: the requests of this worker are spread over all of them."""
    mailbox_folder: str | None = None
    """Where the draft at `address` serves mailboxes of this host directly; None asks it over the wire."""
    num_speculative_tokens: int | None = None
    """K; None is all that the engine was built for, 0 switches speculation off."""
    adaptive_k: bool = False
    """Lower K step by step where load or acceptance say so (`unmask.pairing.policy`)."""
    timeout_ms: float = 2000.0
    """A step that is not answered by then gets no proposals."""
    connect_timeout_ms: float = 10_000.0
    """For connecting, authenticating and receiving the draft's projection, beside the per-step path."""
    retry_s: float = 1.0
    """How long the breaker stays open after a failure."""
    status_file: str | None = None
    """Where the worker keeps its counters (see `unmask.pairing.status`)."""
    target_digest: str = ""
    """`unmask.pairing.hello.record_digest` of the target in hex; empty accepts any draft that fits by its sizes."""

    def __post_init__(self) -> None:
        for address in self.addresses:
            parse_address(address)
        for name in ("timeout_ms", "connect_timeout_ms", "retry_s"):
            if not getattr(self, name) > 0:
                raise ConfigError("must be positive", field=name)
        k = self.num_speculative_tokens
        if k is not None and not 0 <= k <= MAX_SPECULATIVE_TOKENS:
            raise ConfigError(f"must lie in 0..{MAX_SPECULATIVE_TOKENS}", field="num_speculative_tokens")
        if len(self.target_digest) not in (0, 64) or set(self.target_digest) - set("0123456789abcdef"):
            raise ConfigError("must be 64 hex digits or empty", field="target_digest")

    @property
    def addresses(self) -> tuple[str, ...]:
        """All drafts that are placed."""
        return (() if self.address is None else (self.address,)) + self.further_addresses


def read_link_file(path: str | Path) -> LinkConfig:
    """Read a link file. Raises ConfigError for a missing, malformed or impossible one."""
    try:
        tree = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}", field="link file") from None
    except ValueError as error:
        raise ConfigError(f"'{path}' is not valid JSON: {error}", field="link file") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"'{path}' must hold a JSON object", field="link file")
    names = {field.name for field in dataclasses.fields(LinkConfig)}
    for key in tree:
        if key not in names:
            raise ConfigError(f"unknown key in '{path}'{nearest(key, names)}", field=key)
    try:
        return LinkConfig(**(tree | {"further_addresses": tuple(tree.get("further_addresses", ()))}))
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"'{path}': {error}", field="link file") from None


def write_link_file(path: str | Path, config: LinkConfig) -> None:
    """Write or replace a link file atomically."""
    write_json(Path(path), dataclasses.asdict(config))
