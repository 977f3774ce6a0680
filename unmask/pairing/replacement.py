"""Put a published draft in the place of the one that is served."""

from __future__ import annotations

from pathlib import Path

from unmask.checkpoints import check_pairing, load_confidence, load_draft
from unmask.pairing.server import DraftServer
from unmask.types import TargetRecord


def replace_draft(server: DraftServer, path: str | Path, record: TargetRecord) -> int:
    """Load a draft and swap it in; its targets run on. Takes as long as reading the files; serving goes on meanwhile.

    Args:
        server: serves another draft of the same target.
        path: published draft directory.
        record: the target that is served.

    Returns:
        The new version, as in `DraftStats.draft_version`.

    Raises:
        CheckpointError: the draft cannot be read.
        PairingError: it was made for another target. In both cases the old draft goes on serving.
    """
    check_pairing(path, record)
    return server.swap(load_draft(path, server.weights.dtype), record, load_confidence(path))
