"""Our lines in Serve's replica log, whatever else configures logging."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app import replica_log
from serve_app.replica_log import join_replica_log


@pytest.fixture
def serve_log(tmp_path) -> Iterator[Path]:
    """A log as Serve sets it up in a replica: a buffer in front of a file."""
    loggers = [logging.getLogger(name) for name in ("ray.serve", *replica_log._OURS)]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    path = tmp_path / "replica.log"
    file = logging.handlers.RotatingFileHandler(path)
    loggers[0].handlers = [logging.handlers.MemoryHandler(1, target=file)]
    loggers[0].setLevel(logging.INFO)
    yield path
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate
    file.close()


def test_our_lines_go_where_serves_do(serve_log) -> None:
    join_replica_log()
    logging.getLogger("unmask.pairing").info("from us")
    assert "from us" in serve_log.read_text()


def test_a_replica_keeps_its_log_when_logging_is_configured_anew(serve_log) -> None:
    join_replica_log()
    logging.getLogger("ray.serve").info("before")
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    handlers = logging.getLogger("ray.serve").handlers
    [handler] = [h for h in handlers if isinstance(h, logging.handlers.MemoryHandler)]
    # What Serve's controller asks for when it recovers.
    assert handler.target.baseFilename == str(serve_log)
    logging.getLogger("ray.serve").info("after")
    assert serve_log.read_text().split() == ["before", "after"]
