"""Our log lines in Serve's replica logs."""

from __future__ import annotations

import logging

_OURS = ("serve_app", "unmask", "engines")


def join_replica_log() -> None:
    """Send our loggers' lines where Serve sends its own, in its format; called in a replica's constructor."""
    replica_log = logging.getLogger("ray.serve")
    for handler in replica_log.handlers:
        # Whoever configures logging anew, as vLLM does when it is imported, closes all handlers that there are. Serve's
        # would lose its file, for which a controller that recovers asks every replica; it ends one that has none.
        handler.close = handler.flush
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers = replica_log.handlers
        logger.setLevel(replica_log.level)
        logger.propagate = False
