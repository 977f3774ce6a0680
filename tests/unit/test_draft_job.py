"""What a training of a draft begins with."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from actors.draft_job import DraftJob, _drawn_at
from tests.draft_tools import record, tiny_pair
from unmask.checkpoints import save_draft
from unmask.errors import ConfigError
from unmask.files import write_json
from unmask.manifest import Manifest
from unmask.objectives.confidence import ConfidenceHead
from unmask.provenance import write_run
from unmask.recipe import parse_recipe, to_tree
from unmask.teachers import WRITER, check_writer
from unmask.trajectories import write_shard
from unmask.types import Trajectory


def job(run_dir: Path, start: Path | None) -> DraftJob:
    _, draft = tiny_pair()
    recipe = parse_recipe({"draft": {"go_on_from": None if start is None else str(start)}})
    return DraftJob(
        recipe_tree=to_tree(recipe), target_path="", target_record=record(), draft=draft.config, run_dir=str(run_dir)
    )


def test_a_draft_that_is_gone_on_with_keeps_what_it_knows_of_itself(tmp_path: Path) -> None:
    _, draft = tiny_pair()
    known = ConfidenceHead(draft.config.hidden_size, draft.config.block_size - 1)
    with torch.no_grad():
        known.weight.normal_()
        known.bias.normal_()
    save_draft(draft, tmp_path / "with", record(), confidence=known)
    save_draft(draft, tmp_path / "without", record())
    head = job(tmp_path, tmp_path / "with")._first_confidence()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(head.parameters(), known.parameters(), strict=True))
    assert all(p.requires_grad for p in head.parameters())
    for start in (tmp_path / "without", None):
        head = job(tmp_path, start)._first_confidence()
        assert not any(p.any() for p in head.parameters())
        assert head.bias.shape == known.bias.shape


def trajectories(run_dir: Path, decode_config: str, tree: dict[str, object] | None) -> Path:
    row = Trajectory(
        sample_id="a", prompt_ids=[1], response_ids=[2], finish_reason="stop", num_forwards=1, teacher="t",
        teacher_revision="r", decode_config=decode_config,
    )  # fmt: skip
    directory = run_dir / "trajectories"
    Manifest({0: write_shard(directory, 0, [row], [])}).save(directory)
    if tree is not None:
        write_run(directory, tree)
    return run_dir


def test_a_head_is_of_the_temperature_at_which_its_text_was_drawn(tmp_path: Path) -> None:
    warm: dict[str, object] = {"generate": {"temperature": 0.7}}
    assert _drawn_at(trajectories(tmp_path / "warm", "d", warm)) == 0.7
    assert _drawn_at(trajectories(tmp_path / "greedy", "d", {"generate": {}})) == 0.0
    assert _drawn_at(trajectories(tmp_path / "unknown", "d", None)) is None
    assert _drawn_at(trajectories(tmp_path / "captured", "served", warm)) is None


def test_nobody_learns_from_what_another_model_wrote(tmp_path: Path) -> None:
    check_writer(tmp_path, record())
    write_json(tmp_path / WRITER, asdict(record()))
    check_writer(tmp_path, record())
    with pytest.raises(ConfigError, match=r"^target\.model: is not the model that wrote .*another revision"):
        check_writer(tmp_path, replace(record(), revision="other"))
