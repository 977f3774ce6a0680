"""Publication: immutable versions with a card, and drafts that do not fit refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from pipelines.publish import publish
from tests.draft_tools import record, tiny_pair
from unmask.checkpoints import load_draft, read_config, save_draft
from unmask.config import DraftConfig, PublishConfig, Recipe, TargetConfig
from unmask.errors import CheckpointError, PairingError
from unmask.models.dflash import DFlashDraft
from unmask.models.draft_start import draft_sizes
from unmask.targets import describe_target
from unmask.types import TargetRecord


@pytest.fixture(scope="module")
def recipe(light_target: Path) -> Recipe:
    return Recipe(target=TargetConfig(model=str(light_target)))


@pytest.fixture(scope="module")
def target(light_target: Path) -> TargetRecord:
    return describe_target(light_target)


@pytest.fixture(scope="module")
def draft(light_target: Path) -> DFlashDraft:
    shape = DraftConfig(num_layers=1, block_size=4, num_target_features=1)
    sizes = draft_sizes(AutoConfig.from_pretrained(light_target), shape, 3)
    return DFlashDraft(dataclasses.replace(sizes, intermediate_size=8))


@pytest.fixture
def run_dir(tmp_path: Path, target: TargetRecord, draft: DFlashDraft) -> Path:
    save_draft(draft, tmp_path / "draft" / "final", target)
    return tmp_path


def test_a_version_is_published_once(recipe: Recipe, run_dir: Path, target: TargetRecord) -> None:
    first = publish(recipe, run_dir)
    assert publish(recipe, run_dir) == first
    path = Path(first.path)
    assert path.name == f"dflash-{first.version}"
    assert read_config(path)[1] == target
    load_draft(path)
    card = (path / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {recipe.target.model}\n")
    assert target.revision in card
    assert "Not evaluated." in card


def test_other_weights_are_another_version(recipe: Recipe, run_dir: Path, target: TargetRecord) -> None:
    first = publish(recipe, run_dir)
    draft = load_draft(run_dir / "draft" / "final")
    draft.norm.weight.data.mul_(2)
    save_draft(draft, run_dir / "draft" / "final", target)
    assert publish(recipe, run_dir).version != first.version
    assert len(list((run_dir / "published").iterdir())) == 2


def test_a_changed_version_is_noticed(recipe: Recipe, run_dir: Path) -> None:
    path = Path(publish(recipe, run_dir).path)
    (path / "config.json").write_text((path / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="has been changed since it was published"):
        publish(recipe, run_dir)


def test_a_draft_for_another_target_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    save_draft(tiny_pair()[1], tmp_path / "draft" / "final", record())
    with pytest.raises(PairingError, match="hidden_size: the draft was made for 32, the target has 576"):
        publish(recipe, tmp_path)


def test_a_draft_without_a_record_must_be_adopted(recipe: Recipe, run_dir: Path, target: TargetRecord) -> None:
    config = run_dir / "draft" / "final" / "config.json"
    tree = json.loads(config.read_text())
    del tree["unmask_target"]
    config.write_text(json.dumps(tree))
    with pytest.raises(PairingError, match=r"publish\.adopt=true"):
        publish(recipe, run_dir)
    adopting = dataclasses.replace(recipe, publish=PublishConfig(adopt=True))
    assert read_config(publish(adopting, run_dir).path)[1] == target
