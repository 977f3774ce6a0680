"""Runs remember their recipe, and refuse another one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.config import Recipe
from unmask.errors import ConfigError
from unmask.provenance import check_same_run, provenance, write_run
from unmask.recipe import load_recipe, parse_recipe, to_tree


def test_run_yaml_is_a_recipe_that_gives_the_same_run(tmp_path: Path) -> None:
    recipe = parse_recipe({"target": {"engine": {"max_num_seqs": 4}}, "generate": {"temperature": 0.5}})
    write_run(tmp_path, to_tree(recipe))
    assert load_recipe(tmp_path / "run.yaml") == recipe
    check_same_run(tmp_path, to_tree(recipe))


def test_first_difference_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, to_tree(Recipe()))
    other = to_tree(parse_recipe({"generate": {"seed": 1, "max_actors": 3}, "target": {"engine": {"max_num_seqs": 4}}}))
    with pytest.raises(ConfigError, match=r"^generate\.seed: is 1, but .* was started with 0"):
        check_same_run(tmp_path, other, ignore=frozenset({"generate.max_actors", "target.engine.max_num_seqs"}))
    with pytest.raises(ConfigError, match=r"^target\.engine\.max_num_seqs: is 4, but .* was started with None"):
        check_same_run(tmp_path, other, ignore=frozenset({"generate.max_actors", "generate.seed"}))


def test_a_field_that_may_differ_may_with_all_that_it_holds(tmp_path: Path) -> None:
    write_run(tmp_path, {"generate": {"labels": {"role": "a"}, "labels_of": 1}})
    may_differ = frozenset({"generate.labels"})
    check_same_run(tmp_path, {"generate": {"labels": {"zone": "b"}, "labels_of": 1}}, ignore=may_differ)
    with pytest.raises(ConfigError, match=r"^generate\.labels_of"):
        check_same_run(tmp_path, {"generate": {"labels": {}, "labels_of": 2}}, ignore=may_differ)


def test_a_field_that_a_run_did_not_know_has_its_default(tmp_path: Path) -> None:
    older = to_tree(Recipe())
    del older["distill"]["schedule"]
    write_run(tmp_path, older)
    check_same_run(tmp_path, to_tree(Recipe()))
    changed = to_tree(parse_recipe({"distill": {"schedule": "cosine"}}))
    with pytest.raises(ConfigError, match=r"^distill\.schedule: is 'cosine', but .* was started with 'constant_then_"):
        check_same_run(tmp_path, changed)


def test_sections_of_a_stage_are_completed_by_themselves(tmp_path: Path) -> None:
    """A student needs a decoder of the section `generate`, which its stage does not record."""
    whole = to_tree(parse_recipe({"generate": {"decoder": {"name": "one_token"}}, "student": {}}))
    now = {name: whole[name] for name in ("target", "student")}
    older = {"target": whole["target"], "student": {k: v for k, v in whole["student"].items() if k != "seed"}}
    write_run(tmp_path, older)
    check_same_run(tmp_path, now)


def test_a_field_that_only_an_earlier_version_knew_is_named(tmp_path: Path) -> None:
    older = to_tree(Recipe())
    older["distill"]["gone"] = 3
    write_run(tmp_path, older)
    with pytest.raises(ConfigError, match=r"^distill\.gone: is None, but .* was started with 3"):
        check_same_run(tmp_path, to_tree(Recipe()))


def test_a_new_directory_has_nothing_to_refuse(tmp_path: Path) -> None:
    check_same_run(tmp_path / "new", to_tree(Recipe()))


@pytest.mark.parametrize("packed", [False, True])
def test_provenance_tells_commit_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    commit = "c" * 40
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    if packed:
        (git / "packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    else:
        (git / "refs/heads/main").write_text(f"{commit}\n")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    record = provenance()
    assert record["commit"] == commit
    assert {"torch", "pyarrow"} <= record["versions"].keys()
    assert json.loads(json.dumps(record)) == record


def test_commit_is_none_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance()["commit"] is None
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("d" * 40)
    assert provenance()["commit"] == "d" * 40
