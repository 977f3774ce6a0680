"""What a training that goes on from a draft is recorded and run with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import distill as stage
from unmask.recipe import parse_recipe


@pytest.mark.parametrize(("start", "optimizer", "rate"), [(None, None, None), ("earlier", "adamw", 1e-4)])
def test_what_is_left_open_is_recorded_as_it_is_trained(
    start: str | None, optimizer: str | None, rate: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def train(recipe, stage, directory, sections, make_job, *, fresh):
        assert make_job.args[0] is recipe
        given.append(recipe)
        return SimpleNamespace()

    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories" / "manifest.json").write_text("{}")
    monkeypatch.setattr(stage, "train", train)
    recipe = parse_recipe({"draft": {"go_on_from": start}, "distill": {"use_gpu": True, "max_steps": 7}})
    stage.distill(recipe, tmp_path)
    [used] = given
    assert (used.distill.optimizer, used.distill.learning_rate, used.distill.max_steps) == (optimizer, rate, 7)
