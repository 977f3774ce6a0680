"""The diffusion line without a cluster: recipes, teachers, texts, the engine behind a thread, cards and versions."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from actors.generator import decode_digest
from engines.diffusion_engine import OfflineDiffusionEngine, diffusion_arguments
from engines.engine_thread import Completion
from pipelines.publish import publish
from pipelines.student_evaluation import settings
from tests.diffusion_tools import EOS, MASK, request, tiny
from unmask.config import AdaptConfig, PromptsConfig, Recipe, TargetConfig
from unmask.config.generate import DECODERS, DEFAULT_BLOCK
from unmask.copying import copying_rows
from unmask.decoding.generate import generate
from unmask.decoding.registry import build_decoder, decoder_config
from unmask.diffusion_checkpoints import read_lineage, save_checkpoint
from unmask.errors import CheckpointError, ConfigError, PromptError, UserError
from unmask.manifest import Manifest
from unmask.models import families
from unmask.placement import stage_demands
from unmask.prompts import PromptBuilder
from unmask.recipe import parse_recipe
from unmask.targets import describe_target, resolve_target, unused_special_token
from unmask.teachers import check_teacher, with_teacher
from unmask.training.texts import read_texts, read_trajectory_texts, stage_texts
from unmask.trajectories import write_shard
from unmask.types import FinishReason, SamplingOptions, Trajectory

ONE_TOKEN = {"name": "one_token", "block_size": 4}
STUDENT: dict[str, Any] = {
    "target": {"model": "embedded:toy", "max_model_len": 64},
    "generate": {"decoder": ONE_TOKEN, "max_new_tokens": 16, "verifier": "number"},
    "student": {"response_length": 16, "block_size": 4},
}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "generate",
            {"decoder": {"name": "one_tokn"}},
            "generate.decoder.name: unknown decoder 'one_tokn' (did you mean",
        ),
        ("generate", {"decoder": {}}, "generate.decoder.name: unknown decoder None; choose one of"),
        ("generate", {"decoder": {"name": "apd"}}, "generate.decoder.name: unknown decoder 'apd'"),
        ("generate", {"decoder": ONE_TOKEN | {"block_size": 5}}, "generate.decoder.block_size: must divide"),
        ("generate", {"decoder": ONE_TOKEN | {"block_size": 0}}, "generate.decoder.block_size: must divide"),
        ("generate", {"decoder": ONE_TOKEN | {"block_size": "x"}}, "generate.decoder.block_size: must divide"),
        ("generate", {"decoder": None}, "generate.decoder: a student learns from a diffusion LM"),
        ("generate", {"verifier": "nubmer"}, "generate.verifier"),
        ("generate", {"top_k": 4}, "generate.top_k"),
        ("student", {"response_length": 8}, "student.response_length: must be at least generate.max_new_tokens = 16"),
        ("student", {"response_length": 64}, "student.response_length: must leave room for a prompt"),
        ("student", {"objective": "d3f"}, "student.objective"),
        ("student", {"lora": {"rnk": 3}}, "student.lora.rnk: unknown key (did you mean 'rank'?)"),
        ("adapt", {"attention": "block_causal", "block_size": 4}, "adapt.attention: a student's teacher is bidirect"),
        ("adapt", {"max_second": 3}, "adapt.max_second: unknown key (did you mean 'max_seconds'?)"),
    ],
)
def test_recipe_mistakes_name_the_field(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(STUDENT | {section: STUDENT.get(section, {}) | values})
    assert str(caught.value).startswith(message)


def test_the_recipes_decoders_are_the_registrys() -> None:
    for name in DECODERS:
        assert decoder_config({"name": name}).block_size == DEFAULT_BLOCK
    with pytest.raises(ConfigError, match="did you mean 'threshold'"):
        decoder_config({"name": "treshold"})


def test_digests_tell_decoders_apart() -> None:
    recipe = parse_recipe(STUDENT)

    def digest_of(decoder: dict[str, Any]) -> str:
        return decode_digest(parse_recipe(STUDENT | {"generate": STUDENT["generate"] | {"decoder": decoder}}))

    others = {digest_of({"name": "threshold", "block_size": 4}), digest_of(ONE_TOKEN | {"block_size": 8})}
    assert len(others | {decode_digest(recipe)}) == 3
    assert digest_of(ONE_TOKEN | {"cache": "none"}) == decode_digest(recipe)


def test_demands_are_the_students() -> None:
    recipe = parse_recipe(STUDENT | {"adapt": {"num_workers": 2, "labels": {"role": "train"}}})
    [adapting], [training] = (stage_demands(recipe)[stage] for stage in ("adapt", "distill"))
    assert (adapting.most, dict(adapting.labels), training.name, training.most) == (2, {"role": "train"}, "student", 1)
    assert stage_demands(Recipe())["adapt"] == []


def test_the_teacher_is_what_the_recipe_says(tmp_path: Path) -> None:
    recipe = parse_recipe(STUDENT)
    assert with_teacher(recipe, tmp_path) is recipe
    adapting = parse_recipe(STUDENT | {"adapt": {}})
    with pytest.raises(CheckpointError, match=r"^adapt: no teacher at .*pipelines\.adapt"):
        with_teacher(adapting, tmp_path)
    (tmp_path / "teacher" / "final").mkdir(parents=True)
    assert with_teacher(adapting, tmp_path).target.model == str(tmp_path / "teacher" / "final")
    named = parse_recipe(STUDENT | {"adapt": {}, "student": STUDENT["student"] | {"teacher": "/some"}})
    assert with_teacher(named, tmp_path).target.model == "/some"


@pytest.mark.parametrize("family", ["llada", "dream", "adapted"])
def test_teachers_that_cannot_decode_so_are_refused(family: str, tmp_path: Path) -> None:
    families.save(tiny(family), tmp_path)
    (tmp_path / "tokenizer.json").touch()
    check_teacher(tmp_path, ONE_TOKEN)
    with pytest.raises(ConfigError, match=r"^generate\.decoder: the target is a diffusion LM"):
        check_teacher(tmp_path, None)
    with pytest.raises(ConfigError, match="block_causal network"):
        check_teacher(tmp_path, {"name": "d2f", "block_size": 4})


def test_a_causal_lm_needs_no_decoder() -> None:
    path = resolve_target("embedded:toy")
    check_teacher(path, None)
    with pytest.raises(ConfigError, match="the target is a causal LM"):
        check_teacher(path, ONE_TOKEN)


def test_the_engine_answers_as_the_plain_loop_and_refuses_alone(tmp_path: Path) -> None:
    network = tiny("adapted")
    families.save(network, tmp_path)
    requests = [request(length, 8, seed=length) for length in (3, 9, 5, 4, 11)]
    target = TargetConfig(max_model_len=32, engine={"max_rows": 2})
    engine = OfflineDiffusionEngine(diffusion_arguments(target, tmp_path, ONE_TOKEN, dtype="float32"))
    bad = engine.submit((1, MASK), SamplingOptions(max_tokens=8))
    futures: list[Future[Completion]] = [engine.submit(r.prompt_ids, r.options) for r in requests]
    answers = [future.result(timeout=60) for future in futures]
    with pytest.raises(PromptError, match="mask token"):
        bad.result(timeout=60)
    engine.close()
    for answer, wanted in zip(answers, generate(build_decoder(ONE_TOKEN, network), requests), strict=True):
        assert (answer.token_ids, answer.finish_reason) == (wanted.response_ids, wanted.finish_reason)
        assert (answer.num_forwards, answer.commit_step) == (wanted.num_forwards, wanted.commit_step)


@pytest.mark.parametrize(
    ("engine", "length", "message"),
    [
        ({"max_row": 2}, 32, "target.engine: max_row: unknown key (did you mean 'max_rows'?)"),
        ({"max_length": 2}, 32, "target.engine.max_length: is decided by target.max_model_len"),
        ({}, 512, "target.max_model_len: the network's positions end at 256"),
    ],
)
def test_impossible_engine_options_are_named(engine: dict[str, Any], length: int, message: str, tmp_path: Path) -> None:
    families.save(tiny("adapted"), tmp_path)
    target = TargetConfig(max_model_len=length, engine=engine)
    with pytest.raises(ConfigError) as caught:
        OfflineDiffusionEngine(diffusion_arguments(target, tmp_path, ONE_TOKEN, dtype="float32"))
    assert str(caught.value).startswith(message)


def _trajectory(number: int, verdict: bool | None, length: int, reason: FinishReason) -> Trajectory:
    return Trajectory(
        sample_id=str(number),
        prompt_ids=[1, 2],
        response_ids=[number] * length,
        finish_reason=reason,
        num_forwards=length,
        teacher="t",
        teacher_revision="0",
        decode_config="0",
        verdict=verdict,
    )


def test_only_right_and_whole_trajectories_are_learned(tmp_path: Path) -> None:
    rows = [
        _trajectory(0, True, 3, "stop"),
        _trajectory(1, False, 3, "stop"),
        _trajectory(2, None, 3, "stop"),
        _trajectory(3, True, 3, "length"),
        _trajectory(4, True, 8, "length"),
    ]
    directory = tmp_path / "trajectories"
    Manifest({0: write_shard(directory, 0, rows, [])}).save(directory)

    def kept(**options: Any) -> list[int]:
        return [sequence.ids[-1] for sequence in read_trajectory_texts(tmp_path, **options)]

    assert kept(verified=True) == [0, 3, 4]
    assert kept(verified=True, response_length=8) == [0, 4]
    assert kept(verified=False, response_length=8) == [0, 2, 4]
    Manifest({0: write_shard(tmp_path / "none", 0, [rows[1]], [])}).save(tmp_path / "none")
    with pytest.raises(UserError, match=r"^generate\.verifier: none of 1 trajectories is right"):
        read_trajectory_texts(tmp_path / "none", verified=True)


def test_texts_are_staged_once_and_bad_rows_left_out(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_target("embedded:toy"))
    source = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "copy 12", "response": "so: 12"},
        {"prompt": "copy 12"},
        {"prompt": "", "response": "x"},
        {"prompt": "copy 1<|mask|>", "response": "1"},
        {"prompt": "copy 13", "response": "it is<|end|>"},
        {"prompt": "copy 13", "response": "1" * 30},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AdaptConfig(data=PromptsConfig(source=str(source)), response_length=16)
    builder = PromptBuilder(tokenizer, config.data, max_prompt_len=40, mask_token_id=unused_special_token(tokenizer))
    path = tmp_path / "texts.parquet"
    assert stage_texts(config, builder, tokenizer, path) == 1
    [text] = read_texts(path)
    assert tokenizer.decode(text.ids[text.prompt_length :]) == "so: 12"
    rejected = json.loads((tmp_path / "rejected.json").read_text())
    assert [row["index"] for row in rejected["rows"]] == [1, 2, 3, 4, 5]
    source.write_text(json.dumps(rows[1]) + "\n")
    assert stage_texts(config, builder, tokenizer, path) == 1
    with pytest.raises(UserError, match=r"^adapt\.data\.source: none of 1 rows can be used, the first because"):
        stage_texts(config, builder, tokenizer, tmp_path / "other.parquet")


def test_numbers_to_copy_are_held_out() -> None:
    train, test = (copying_rows("train"), copying_rows("test"))
    trained = {next(train)["answer"] for _ in range(500)}
    tested = [next(test) for _ in range(100)]
    assert not trained & {row["answer"] for row in tested}
    assert all(row["response"].endswith(row["answer"]) for row in tested)


def _student(path: Path) -> None:
    record = describe_target(resolve_target("embedded:toy"))
    lineage = {"made_by": "dparallel", "source": "toy", "source_record": dataclasses.asdict(record), "steps": 3}
    save_checkpoint(
        tiny("adapted"), path, tokenizer_of=resolve_target("embedded:toy"), lineage=lineage, texts={"run.yaml": "{}"}
    )


def test_a_student_is_published_once_with_its_card(tmp_path: Path) -> None:
    recipe = parse_recipe(STUDENT)
    _student(tmp_path / "student" / "final")
    row = {
        "set": "new_items", "n": 10, "checkpoint": "student", "decoder": {"name": "dparallel"}, "accuracy": 90.0,
        "ci95": [59.6, 98.2], "nfe": 3.0, "tpf": 2.5,
    }  # fmt: skip
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps({"rows": [row], "aup": {}}))
    report = publish(recipe, tmp_path)
    path = Path(report.path)
    assert path.name == f"dparallel-{report.version}"
    assert families.load(path).eos_ids == (EOS, 0)
    assert (path / "tokenizer.json").is_file()
    assert (
        "| new_items (10) | student | dparallel | 90.0 (59.6 to 98.2) | 3.0 | 2.50 |"
        in (path / "README.md").read_text()
    )
    assert publish(recipe, tmp_path) == report
    (path / "README.md").write_text("changed")
    with pytest.raises(CheckpointError, match="has been changed since it was published"):
        publish(recipe, tmp_path)


def test_a_damaged_student_is_refused(tmp_path: Path) -> None:
    _student(tmp_path / "student" / "final")
    (tmp_path / "student" / "final" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="has been changed since it was saved"):
        read_lineage(tmp_path / "student" / "final")
    with pytest.raises(CheckpointError, match=r"lineage\.json is missing"):
        publish(parse_recipe(STUDENT), tmp_path / "nothing")


def test_a_student_is_measured_by_its_own_decoder_beside_its_teacher() -> None:
    recipe = parse_recipe(STUDENT)
    assert recipe.student is not None
    table = [(s.checkpoint, s.decoder["name"], s.decoder["block_size"]) for s in settings(recipe, recipe.student)]
    assert table == [("teacher", "one_token", 4), ("teacher", "threshold", 4), ("student", "dparallel", 4)]
