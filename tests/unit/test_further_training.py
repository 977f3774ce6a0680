"""What a training that goes on, from a draft or where it was, is recorded and run with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import distill as stage
from pipelines.training import train
from unmask.config import Recipe
from unmask.errors import ConfigError
from unmask.manifest import Manifest, ShardEntry
from unmask.recipe import parse_recipe
from unmask.trajectories import trajectories_digest


@pytest.mark.parametrize(("start", "optimizer", "rate"), [(None, None, None), ("earlier", "adamw", 1e-4)])
def test_what_is_left_open_is_recorded_as_it_is_trained(
    start: str | None, optimizer: str | None, rate: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def train(recipe, stage, directory, sections, make_job, *, fresh, texts):
        assert make_job.args[0] is recipe
        given.append(recipe)
        return SimpleNamespace()

    (tmp_path / "trajectories").mkdir()
    Manifest().save(tmp_path / "trajectories")
    monkeypatch.setattr(stage, "train", train)
    recipe = parse_recipe({"draft": {"go_on_from": start}, "distill": {"use_gpu": True, "max_steps": 7}})
    stage.distill(recipe, tmp_path)
    [used] = given
    assert (used.distill.optimizer, used.distill.learning_rate, used.distill.max_steps) == (optimizer, rate, 7)


class Begun(Exception):
    """Nothing was refused before the workers."""


def test_a_training_does_not_go_on_with_other_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(demand):
        raise Begun

    def begin(*, fresh: bool = False) -> None:
        sections = ("target", "draft", "distill")
        texts = trajectories_digest(tmp_path / "trajectories")
        train(Recipe(), "distill", tmp_path / "draft", sections, lambda: None, fresh=fresh, texts=texts)

    monkeypatch.setattr("pipelines.training.connect_for", connect)
    shards = {n: ShardEntry(rows=2, quarantined=0, tokens=9, size=100, sha256=f"{n:064d}") for n in range(3)}
    (tmp_path / "trajectories").mkdir()
    Manifest(shards).save(tmp_path / "trajectories")
    for _ in range(2):
        with pytest.raises(Begun):
            begin()
    shards[1] = replace(shards[1], sha256="f" * 64)
    Manifest(shards).save(tmp_path / "trajectories")
    with pytest.raises(ConfigError, match=r"^run_dir: its trajectories are others than those that .*--fresh"):
        begin()
    for fresh in (True, False):
        with pytest.raises(Begun):
            begin(fresh=fresh)
