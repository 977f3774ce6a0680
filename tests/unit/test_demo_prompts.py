"""The demo's prompts: enough of them, apart from each other, and the same in every run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from unmask.demo_prompts import NEW, TRAINED, demo_prompts, demo_rows


def test_splits_have_the_sizes_that_training_needs() -> None:
    assert 1000 <= len(demo_prompts("train")) <= 1200
    assert len(demo_prompts("new_items")) >= 100
    assert len(demo_prompts("new_templates")) >= 30
    assert len(TRAINED) >= 8
    assert len(NEW) >= 2


def test_no_prompt_is_repeated_within_or_across_splits() -> None:
    prompts = [prompt for split in ("train", "new_items", "new_templates") for prompt in demo_prompts(split)]
    assert len(prompts) == len(set(prompts))


def test_held_out_templates_are_never_trained_on() -> None:
    templates = {
        split: {row["template"] for row in demo_rows(split)} for split in ("train", "new_items", "new_templates")
    }
    assert templates["train"] == templates["new_items"] == set(TRAINED)
    assert templates["new_templates"] == set(NEW)
    assert not set(TRAINED) & set(NEW)


def test_every_prefix_holds_the_templates_in_equal_shares() -> None:
    counts = Counter(row["template"] for row in demo_rows("train")[: 5 * len(TRAINED)])
    assert set(counts.values()) == {5}


def test_prompts_do_not_change_from_process_to_process() -> None:
    code = "from unmask.demo_prompts import demo_prompts; print(*demo_prompts('train'), sep=chr(10))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.splitlines() == demo_prompts("train")


def test_slots_are_all_filled_and_shares_come_out_even() -> None:
    for row in demo_rows("train") + demo_rows("new_templates"):
        assert "{" not in row["prompt"]
        if row["template"] == "shares":
            total, friends = (int(word) for word in row["prompt"].split() if word.isdigit())
            assert total % friends == 0


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="new_templates"):
        demo_rows("validation")  # type: ignore[arg-type]
