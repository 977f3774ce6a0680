"""Stages of the line: skipped when complete and unchanged, started over when their inputs change."""

import dataclasses
from dataclasses import dataclass

import pytest

from pipelines.run import Line, table
from unmask.config import AdaptConfig, Recipe, StudentConfig
from unmask.placement import PLACING
from unmask.recipe import parse_recipe, to_tree

OTHER = {
    int: 3, float: 3.0, bool: True, dict: {"role": "other"}, type(None): 3, str: "other",
    "feature_cache_device": "training",
}  # fmt: skip
"""Another value for a field, by its name or its type."""


@dataclass
class Report:
    value: int


class KilledError(Exception):
    """In the place of a signal."""


def go(recipe, directory, log, killed=None):
    """Each stage leaves a file, and tells whether it found one; one may be killed after that."""
    line = Line(recipe, directory)

    def work(name):
        trace = directory / {"generate": "trajectories", "distill": "draft"}.get(name, "evaluation") / "trace"
        log.append((name, trace.exists()))
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.touch()
        if name == killed:
            raise KilledError
        return Report(len(log))

    for name in ("generate", "distill", "evaluate"):
        line.stage(name, lambda name=name: work(name))
    return log


def test_unchanged_stages_are_skipped(tmp_path):
    assert go(Recipe(), tmp_path, []) == [("generate", False), ("distill", False), ("evaluate", False)]
    assert go(Recipe(), tmp_path, []) == []


def test_a_changed_stage_starts_over_with_all_that_follow(tmp_path):
    go(Recipe(), tmp_path, [])
    distill = dataclasses.replace(Recipe().distill, seed=7)
    changed = dataclasses.replace(Recipe(), distill=distill)
    assert go(changed, tmp_path, []) == [("distill", False), ("evaluate", True)], "nothing of the old training is left"
    assert go(changed, tmp_path, []) == []


def test_a_changed_stage_that_is_killed_is_gone_on_with(tmp_path):
    go(Recipe(), tmp_path, [])
    changed = dataclasses.replace(Recipe(), generate=dataclasses.replace(Recipe().generate, seed=7))
    for found in (False, True):
        log = []
        with pytest.raises(KilledError):
            go(changed, tmp_path, log, killed="generate")
        assert log == [("generate", found)]
    assert go(changed, tmp_path, []) == [("generate", True), ("distill", False), ("evaluate", True)]


def test_a_killed_training_is_not_gone_on_with_on_other_trajectories(tmp_path):
    with pytest.raises(KilledError):
        go(Recipe(), tmp_path, [], killed="distill")
    changed = dataclasses.replace(Recipe(), generate=dataclasses.replace(Recipe().generate, seed=7))
    assert go(changed, tmp_path, []) == [("generate", False), ("distill", False), ("evaluate", False)]


def test_another_placement_changes_nothing(tmp_path):
    """Every field that only places work may differ: the run goes on upon another cluster."""
    go(Recipe(), tmp_path, [])
    tree = {"target": {"engine": {"max_num_seqs": 7, "enforce_eager": True}}}
    for section, names in PLACING.items():
        if section not in ("adapt", "student"):
            defaults = to_tree(getattr(Recipe(), section))
            tree[section] = {name: OTHER.get(name, OTHER[type(defaults[name])]) for name in names}
    tree["distill"] |= {"sequences_per_step": 2, "num_workers": 2, "min_workers": 1}
    moved = parse_recipe(tree)
    assert moved != Recipe()
    assert go(moved, tmp_path, []) == []
    other_engine = dataclasses.replace(Recipe().target, engine={"quantization": "fp8"})
    assert go(dataclasses.replace(Recipe(), target=other_engine), tmp_path, [])[0] == ("generate", False)


def test_every_placing_field_exists():
    for section, names in PLACING.items():
        cls = {"adapt": AdaptConfig, "student": StudentConfig}.get(section) or type(getattr(Recipe(), section))
        assert names <= {field.name for field in dataclasses.fields(cls)}


def test_an_unfinished_stage_is_resumed(tmp_path):
    go(Recipe(), tmp_path, [])
    (tmp_path / "stages" / "evaluate.json").unlink()
    assert go(Recipe(), tmp_path, []) == [("evaluate", True)]


def test_the_table_names_every_figure():
    text = table({"generate": {"rows": 3, "rates": [0.5, 1.0]}, "seconds": 1.25})
    assert text.splitlines() == ["generate.rows   3", "generate.rates  0.500 1.000", "seconds         1.250"]
