"""Every recipe in the tree is runnable, and every mistake is one line that names the field."""

from pathlib import Path

import pytest

from unmask.config import published
from unmask.errors import ConfigError
from unmask.recipe import digest, load_recipe, parse_recipe, to_tree

RECIPES = sorted(Path("recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipe_is_valid_and_comes_back_from_its_own_tree(path):
    recipe = load_recipe(path)
    assert parse_recipe(to_tree(recipe)) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distil.max_steps=3"], "did you mean 'distill'"),
        (["distill.max_second=3"], "distill.max_second: unknown key (did you mean 'max_seconds'?)"),
        (["evaluate.new_items.fild=x"], "evaluate.new_items.fild: unknown key (did you mean 'field'?)"),
        (["distill.max_seconds=-5"], "distill.max_seconds: must be positive"),
        (["serve.eight_bit_rows=true"], "serve.eight_bit_rows: needs a target on a GPU"),
        (["serve.turns_from=48"], "serve.turns_from: needs a target on a GPU"),
        (["serve.turns_from=1", "serve.target_gpus=1"], "serve.turns_from: needs a target on a GPU"),
        (["serve.num_speculative_tokens=8"], "serve.num_speculative_tokens: K = 8 exceeds block size - 1 = 7"),
        (["generate.samples_per_prompt=2"], "generate.samples_per_prompt"),
        (["generate.max_new_tokens=256"], "generate.max_new_tokens: must leave room"),
        (["generate.top_k=many"], "generate.top_k"),
        (["distill.max_seconds=null"], "the run has no end"),
        (["distill.cuda_graph=true"], "distill.cuda_graph: needs use_gpu, tokens_per_step"),
        (["distill.confidence_weight=1"], "distill.head_negatives: must be null with a confidence head"),
        (["distill.use_gpu=true", "distill.learning_rate=1e-3"], "distill.optimizer: name it beside learning_rate"),
        (["distill.learning_rate=0"], "distill.learning_rate: must be positive"),
        (["distill.pace_smoothing=1.5"], "distill.pace_smoothing: must be in [0, 1]"),
        (["distill.target_temperature=0"], "distill.target_temperature: must be positive"),
        (
            ["distill.loss=ce", "distill.target_temperature=0.5"],
            "distill.target_temperature: has no effect: with loss: ce",
        ),
        (
            ["distill.weighting=d_pace", "distill.decay_gamma=4"],
            "distill.decay_gamma: has no effect: it is of weighting: decay",
        ),
        (["distill.pace_smoothing=0.2"], "distill.pace_smoothing: has no effect: it is of weighting: d_pace"),
        (["distill.gate_temperature=0"], "distill.gate_temperature: has no effect: it is of gate: target_relative"),
        (["distill.rows_per_step=2"], "distill.rows_per_step: has no effect: it is of packed rows"),
        (["distill.tokens_per_step=256", "distill.anchors_per_sequence=8"], "packed rows (tokens_per_step) take"),
        (["distill"], "must look like section.field=value"),
        (["run_dir.x=1"], "is a value, not a section"),
    ],
)
def test_mistakes_name_the_field_and_the_remedy(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe("recipes/demo.yaml", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "optimizer", "rate"),
    [
        ({}, "adamw", 1.5e-3),
        ({"use_gpu": True}, "muon", 1.2e-2),
        ({"optimizer": "muon"}, "muon", 1.2e-2),
        ({"use_gpu": True, "optimizer": "adamw"}, "adamw", 1.5e-3),
        ({"use_gpu": True, "optimizer": "muon", "learning_rate": 6e-3}, "muon", 6e-3),
    ],
)
def test_an_optimizer_has_a_rate_of_its_own(section, optimizer, rate):
    config = parse_recipe({"distill": section}).distill
    assert (config.chosen_optimizer, config.highest_rate) == (optimizer, rate)


@pytest.mark.parametrize(
    ("section", "optimizer", "rate", "start"),
    [
        ({}, "adamw", 1.5e-3, 0.3),
        ({"use_gpu": True}, "adamw", 1e-4, 0.0),
        ({"use_gpu": True, "certainty_start": 0.5}, "adamw", 1e-4, 0.5),
        ({"use_gpu": True, "optimizer": "muon"}, "muon", 1.2e-2, 0.3),
        ({"use_gpu": True, "optimizer": "adamw", "learning_rate": 2e-4}, "adamw", 2e-4, 0.3),
    ],
)
def test_what_is_left_open_suits_a_draft_that_is_trained_already(section, optimizer, rate, start):
    config = parse_recipe({"distill": section}).distill.further()
    assert (config.chosen_optimizer, config.highest_rate, config.certainty_start) == (optimizer, rate, start)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        load_recipe(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("generate: {max_actors: 2}\ngenerate: {max_actors: 3}\n", "is not valid YAML: 'generate' is given twice"),
        ("generate: {max_actors: 2, max_actors: 3}\n", "'max_actors' is given twice"),
        ("generate: {}\n---\ndistill: {}\n", "holds several YAML documents"),
    ],
)
def test_nothing_of_a_recipe_is_passed_over(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_digests_tell_configurations_apart():
    first, second = load_recipe("recipes/demo.yaml"), load_recipe("recipes/demo.yaml", ["generate.seed=1"])
    assert digest(first) == digest(load_recipe("recipes/demo.yaml"))
    assert digest(first.generate) != digest(second.generate)
    assert digest(first.distill) == digest(second.distill)


def test_the_papers_recipe_is_valid():
    assert published().anchors_per_sequence == 512
