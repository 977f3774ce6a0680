"""The exit code of `python -m serve_app`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from serve_app import __main__ as command
from unmask.config import Recipe


def test_sigterm_before_it_serves_is_a_line_and_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(recipe: Recipe) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(command, "serve_until_stopped", load)
    path = tmp_path / "recipe.yaml"
    path.write_text("serve: {name: other}\n")
    assert command.main([str(path)]) == 130
    assert capsys.readouterr().err == "error: stopped before it could serve\n"
