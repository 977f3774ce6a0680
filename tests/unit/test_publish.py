"""Publication: immutable versions with a card, and drafts that do not fit refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from pipelines.publish import _name_for_loaders, publish
from tests.draft_tools import record, tiny_pair
from tests.speculators_tools import speculators_config
from unmask.checkpoints import load_confidence, load_draft, read_config, save_draft
from unmask.config import DraftConfig, PublishConfig, Recipe, TargetConfig
from unmask.errors import CheckpointError, PairingError
from unmask.models.dflash import DFlashDraft
from unmask.models.draft_start import draft_sizes
from unmask.objectives.confidence import ConfidenceHead
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


def test_another_head_or_config_is_another_version(recipe: Recipe, run_dir: Path, target: TargetRecord) -> None:
    source, versions = run_dir / "draft" / "final", [publish(recipe, run_dir).version]
    draft = load_draft(source)
    head = ConfidenceHead(draft.config.hidden_size, draft.config.block_size - 1)
    for bias in (1.0, 2.0):
        torch.nn.init.constant_(head.bias, bias)
        save_draft(draft, source, target, confidence=head)
        report = publish(recipe, run_dir)
        published = load_confidence(report.path)
        assert published is not None
        assert torch.equal(published.bias, head.bias)
        versions.append(report.version)
    tree = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(tree | {"rms_norm_eps": 1e-4}))
    versions.append(publish(recipe, run_dir).version)
    assert len(set(versions)) == 4


def test_the_speculators_form_says_where_the_target_is(recipe: Recipe, run_dir: Path, light_target: Path) -> None:
    report = publish(dataclasses.replace(recipe, publish=PublishConfig(format="speculators")), run_dir)
    assert report.version != publish(recipe, run_dir).version
    tree = json.loads((Path(report.path) / "config.json").read_text())
    assert tree["speculators_config"]["verifier"]["name_or_path"] == str(light_target.absolute())
    assert "    vllm serve DIRECTORY\n" in (Path(report.path) / "README.md").read_text()


def test_a_target_on_the_hub_is_named_by_its_id(recipe: Recipe, tmp_path: Path) -> None:
    for model, name in (
        ("owner/model", "owner/model"),
        ("embedded:toy", str(tmp_path)),
        (str(tmp_path), str(tmp_path)),
    ):
        named = dataclasses.replace(recipe, target=TargetConfig(model=model))
        assert _name_for_loaders(named, tmp_path) == name


def test_a_draft_of_speculators_own_is_adopted(
    recipe: Recipe, tmp_path: Path, target: TargetRecord, draft: DFlashDraft
) -> None:
    source = tmp_path / "draft" / "final"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(speculators_config(draft.config)))
    head = torch.zeros(draft.config.vocab_size, draft.config.hidden_size)
    save_file(draft.state_dict() | {"lm_head.weight": head}, source / "model.safetensors")
    with pytest.raises(PairingError, match=r"publish\.adopt=true"):
        publish(recipe, tmp_path)
    path = publish(dataclasses.replace(recipe, publish=PublishConfig(adopt=True)), tmp_path).path
    assert read_config(path) == (draft.config, target)
    assert set(load_file(Path(path) / "model.safetensors")) == set(draft.state_dict())


def test_a_changed_version_is_noticed(recipe: Recipe, run_dir: Path) -> None:
    path = Path(publish(recipe, run_dir).path)
    (path / "config.json").write_text((path / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="has been changed since it was published"):
        publish(recipe, run_dir)


def test_a_draft_for_another_target_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    save_draft(tiny_pair()[1], tmp_path / "draft" / "final", record())
    config = tmp_path / "draft" / "final" / "config.json"
    tree = json.loads(config.read_text())
    for adopt in (False, True):
        asked = dataclasses.replace(recipe, publish=PublishConfig(adopt=adopt))
        with pytest.raises(PairingError, match="hidden_size: the draft was made for 32, the target has 576"):
            publish(asked, tmp_path)
        config.write_text(json.dumps({key: value for key, value in tree.items() if key != "unmask_target"}))


def test_a_draft_without_a_record_must_be_adopted(recipe: Recipe, run_dir: Path, target: TargetRecord) -> None:
    config = run_dir / "draft" / "final" / "config.json"
    tree = json.loads(config.read_text())
    del tree["unmask_target"]
    config.write_text(json.dumps(tree))
    with pytest.raises(PairingError, match=r"publish\.adopt=true"):
        publish(recipe, run_dir)
    adopting = dataclasses.replace(recipe, publish=PublishConfig(adopt=True))
    assert read_config(publish(adopting, run_dir).path)[1] == target
