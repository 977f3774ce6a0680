"""Stages of the line: skipped when complete and unchanged, started over when their inputs change."""

import dataclasses
from dataclasses import dataclass

from pipelines.run import Line, table
from unmask.config import Recipe


@dataclass
class Report:
    value: int


def go(recipe, directory, log):
    line = Line(recipe, directory)
    for name in ("generate", "distill", "evaluate"):
        line.stage(name, lambda again, name=name: log.append((name, again)) or Report(len(log)))
    return log


def test_unchanged_stages_are_skipped(tmp_path):
    assert go(Recipe(), tmp_path, []) == [("generate", False), ("distill", False), ("evaluate", False)]
    assert go(Recipe(), tmp_path, []) == []


def test_a_changed_stage_starts_over_with_all_that_follow(tmp_path):
    go(Recipe(), tmp_path, [])
    distill = dataclasses.replace(Recipe().distill, seed=7)
    changed = dataclasses.replace(Recipe(), distill=distill)
    assert go(changed, tmp_path, []) == [("distill", True), ("evaluate", True)]
    assert go(changed, tmp_path, []) == []


def test_an_unfinished_stage_is_resumed(tmp_path):
    go(Recipe(), tmp_path, [])
    (tmp_path / "stages" / "evaluate.json").unlink()
    assert go(Recipe(), tmp_path, []) == [("evaluate", False)]


def test_the_table_names_every_figure():
    text = table({"generate": {"rows": 3, "rates": [0.5, 1.0]}, "seconds": 1.25})
    assert text.splitlines() == ["generate.rows   3", "generate.rates  0.500 1.000", "seconds         1.250"]
