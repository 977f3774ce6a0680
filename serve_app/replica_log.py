"""Our log lines in Serve's replica logs."""

from __future__ import annotations

import logging

_OURS = ("serve_app", "unmask", "engines")


def join_replica_log() -> None:
    """Send our loggers' lines where Serve sends its own, in its format; called in a replica's constructor."""
    replica_log = logging.getLogger("ray.serve")
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers = replica_log.handlers
        logger.setLevel(replica_log.level)
        logger.propagate = False
