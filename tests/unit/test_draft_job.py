"""What a training of a draft begins with."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from actors.draft_job import DraftJob
from tests.draft_tools import record, tiny_pair
from unmask.checkpoints import save_draft
from unmask.errors import ConfigError
from unmask.files import write_json
from unmask.objectives.confidence import ConfidenceHead
from unmask.recipe import parse_recipe, to_tree
from unmask.teachers import WRITER, check_writer


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


def test_nobody_learns_from_what_another_model_wrote(tmp_path: Path) -> None:
    check_writer(tmp_path, record())
    write_json(tmp_path / WRITER, asdict(record()))
    check_writer(tmp_path, record())
    with pytest.raises(ConfigError, match=r"^target\.model: is not the model that wrote .*another revision"):
        check_writer(tmp_path, replace(record(), revision="other"))
