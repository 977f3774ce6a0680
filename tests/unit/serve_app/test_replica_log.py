"""Our lines in Serve's replica log, whatever else configures logging."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.replica_log import join_replica_log


@pytest.fixture
def serve_log(tmp_path) -> Iterator[Path]:
    """A log as Serve sets it up in a replica: a buffer in front of a file."""
    logger, path = logging.getLogger("ray.serve"), tmp_path / "replica.log"
    before = logger.handlers, logger.level, logger.propagate
    ours = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in ("unmask",)}
    file = logging.handlers.RotatingFileHandler(path)
    logger.handlers = [logging.handlers.MemoryHandler(1, target=file)]
    logger.setLevel(logging.INFO)
    yield path
    logger.handlers, logger.level, logger.propagate = before
    for name, (handlers, propagate) in ours.items():
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
    file.close()


def test_our_lines_go_where_serves_do(serve_log) -> None:
    join_replica_log()
    logging.getLogger("unmask.pairing").info("from us")
    assert "from us" in serve_log.read_text()


def test_a_replica_keeps_its_log_when_logging_is_configured_anew(serve_log) -> None:
    join_replica_log()
    logging.getLogger("ray.serve").info("before")
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    [handler] = logging.getLogger("ray.serve").handlers
    # What Serve's controller asks for when it recovers.
    assert handler.target.baseFilename == str(serve_log)
    logging.getLogger("ray.serve").info("after")
    assert serve_log.read_text().split() == ["before", "after"]
