"""What the stages of the diffusion line train, on one rank and without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.diffusion_evaluator import DiffusionEvaluator, DiffusionEvaluatorSpec
from actors.diffusion_jobs import TEXTS, AdaptJob, DiffusionJob, StudentJob
from actors.learner import Place
from unmask.decoding.engine import EngineConfig
from unmask.diffusion_checkpoints import read_lineage
from unmask.errors import UserError
from unmask.manifest import Manifest
from unmask.models import families
from unmask.prompt_rows import prompt_rows
from unmask.prompts import PromptBuilder
from unmask.recipe import parse_recipe, to_tree
from unmask.targets import describe_target, resolve_target, unused_special_token
from unmask.training.texts import stage_texts
from unmask.training.training_state import resume_state, save_state
from unmask.trajectories import write_shard
from unmask.types import Trajectory

PLACE = Place(rank=0, world_size=1, device=torch.device("cpu"))
TRAINING = {"response_length": 16, "max_steps": 4, "sequences_per_step": 4, "precision": "float32"}
Tree = dict[str, Any]


def recipe_tree(**sections: Tree) -> Tree:
    generate = {"decoder": {"name": "one_token", "block_size": 8}, "max_new_tokens": 16, "verifier": "number"}
    tree = {
        "target": {"model": "embedded:toy", "max_model_len": 64},
        "prompts": {"source": "copying"},
        "adapt": TRAINING | {"data": {"source": "copying", "limit": 32}},
        "generate": generate,
        "student": TRAINING | {"block_size": 8},
    }
    return to_tree(parse_recipe({name: tree.get(name, {}) | sections.get(name, {}) for name in tree}))


def adapt_job(folder: Path, **adapt: Any) -> AdaptJob:
    from transformers import AutoTokenizer

    tree = recipe_tree(adapt=adapt, student={"teacher": "elsewhere"})
    config = parse_recipe(tree).adapt
    assert config is not None
    source = resolve_target("embedded:toy")
    tokenizer = AutoTokenizer.from_pretrained(source)
    mask = unused_special_token(tokenizer)
    record = describe_target(source)
    job = AdaptJob(recipe_tree=tree, run_dir=str(folder), source=str(source), record=record, mask_id=mask)
    builder = PromptBuilder(tokenizer, config.data, max_prompt_len=48, mask_token_id=mask)
    stage_texts(config, builder, tokenizer, job.directory / TEXTS)
    return job


def student_job(folder: Path, teacher: Path, **student: Any) -> StudentJob:
    record = describe_target(teacher)
    return StudentJob(recipe_tree=recipe_tree(student=student), run_dir=str(folder), source=str(teacher), record=record)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    job = adapt_job(folder)
    trainer = job.build(PLACE)
    trainer.step(0.0)
    job.save(trainer, folder / "final", {"run.yaml": "{}"})
    return folder / "final"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Ten right trajectories and two wrong ones, which hold another token."""
    rows = [
        Trajectory(
            sample_id=str(n),
            prompt_ids=[6, 18, 19],
            response_ids=[30 + n] * 5 + [0],
            finish_reason="stop",
            num_forwards=6,
            teacher="t",
            teacher_revision="0",
            decode_config="0",
            verdict=n < 10,
        )
        for n in range(12)
    ]
    Manifest({0: write_shard(tmp_path / "trajectories", 0, rows, [])}).save(tmp_path / "trajectories")
    return tmp_path


def test_an_adapted_model_is_a_whole_checkpoint(teacher: Path) -> None:
    network = families.load(teacher)
    assert network.attention == "bidirectional"
    assert network.mask_id == unused_special_token_of(teacher)
    assert read_lineage(teacher)["made_by"] == "adapt:bidirectional"
    assert (teacher / "run.yaml").read_text() == "{}"
    assert network.model.norm.weight.dtype == torch.float32
    assert describe_target(teacher).tokenizer_hash == describe_target(resolve_target("embedded:toy")).tokenizer_hash


def unused_special_token_of(path: Path) -> int:
    from transformers import AutoTokenizer

    return unused_special_token(AutoTokenizer.from_pretrained(path))


@pytest.mark.parametrize(
    ("attention", "block_size"), [("block_causal", 4), ("causal", None)], ids=["block causal", "fine-tuned"]
)
def test_other_attentions_are_kept(attention: str, block_size: int | None, tmp_path: Path) -> None:
    job = adapt_job(tmp_path, attention=attention, block_size=block_size, precision="bfloat16")
    trainer = job.build(PLACE)
    trainer.step(0.0)
    job.save(trainer, tmp_path / "final", {})
    network = families.load(tmp_path / "final")
    assert (network.attention, network.block_size) == (attention, block_size)
    assert network.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "student",
    [
        {"objective": "dparallel"},
        {"objective": "dparallel", "lora": {"rank": 2, "dropout": 0.2}, "ema": 0.9},
        {"objective": "d2f"},
        {"objective": "d2f", "lora": {"rank": 2}},
    ],
    ids=lambda student: f"{student['objective']}{' lora' if 'lora' in student else ''}",
)
def test_a_resumed_student_takes_the_same_steps(student: Tree, teacher: Path, run_dir: Path) -> None:
    job = student_job(run_dir, teacher, **student)
    whole = job.build(PLACE)
    assert {token for s in whole.sequences.sequences for token in s.ids[3:-1]} == set(range(30, 40))
    losses = [whole.step(step / 4)["loss"] for step in range(4)]
    first = job.build(PLACE)
    again = [first.step(step / 4)["loss"] for step in range(2)]
    save_state(job.directory / "checkpoints", first, {})
    second = job.build(PLACE)
    assert resume_state(job.directory / "checkpoints", second) is not None
    again += [second.step(step / 4)["loss"] for step in (2, 3)]
    assert again == losses
    job.save(whole, run_dir / "whole", {})
    job.save(second, run_dir / "resumed", {})
    weights, resumed = (families.load(run_dir / name).state_dict() for name in ("whole", "resumed"))
    assert all(weights[name].equal(resumed[name]) for name in weights)
    assert weights.keys() == families.load(teacher).state_dict().keys()
    attention = "block_causal" if student["objective"] == "d2f" else "bidirectional"
    assert families.read(run_dir / "whole").attention == attention


def test_too_few_sequences_name_the_section(teacher: Path, run_dir: Path) -> None:
    job: DiffusionJob = student_job(run_dir, teacher, sequences_per_step=11)
    with pytest.raises(UserError, match=r"^student\.sequences_per_step: only 10 sequences"):
        job.build(PLACE)


def test_unknown_projections_are_refused(teacher: Path, run_dir: Path) -> None:
    job = student_job(run_dir, teacher, lora={"targets": ["q_prj"]})
    with pytest.raises(UserError, match=r"^student\.lora\.targets: no projection is named 'q_prj'"):
        job.build(PLACE)


def test_an_evaluator_judges_what_it_decodes(teacher: Path) -> None:
    from transformers import AutoTokenizer

    spec = DiffusionEvaluatorSpec(
        checkpoints={"teacher": str(teacher)},
        engine=EngineConfig(max_rows=2, max_length=64),
        response_length=16,
        verifier="number",
        reference="answer",
        dtype="float32",
        threads=1,
    )
    evaluator = DiffusionEvaluator(spec)
    config = parse_recipe(recipe_tree(adapt={"data": {"source": "copying", "limit": 5}})).adapt
    assert config is not None
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    builder = PromptBuilder(tokenizer, config.data, max_prompt_len=48, mask_token_id=unused_special_token(tokenizer))
    prompts = [builder.build(row) for row in prompt_rows(config.data)]
    ids = [list(prompt.ids) for prompt in prompts]
    done = evaluator.run("teacher", {"name": "one_token", "block_size": 8}, ids, [p.source for p in prompts])
    assert len(done["completions"]) == len(done["right"]) == 5
    assert json.loads(json.dumps(done)) == done
    spoken = tokenizer.decode(done["completions"][0]["response_ids"], skip_special_tokens=True)
    digits = "".join(c if c.isdigit() else " " for c in spoken).split()
    if digits:
        rows = [{"answer": digits[-1]}]
        assert evaluator.run("teacher", {"name": "one_token", "block_size": 8}, ids[:1], rows)["right"] == [True]
