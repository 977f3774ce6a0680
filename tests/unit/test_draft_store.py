"""What a draft benchmark keeps from call to call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.batched_generation import Response
from benchmarks.draft_lines import ABLATIONS
from benchmarks.draft_quality import cases
from benchmarks.draft_store import FIELDS, Store
from tests.draft_tools import tiny_pair


def test_cases_are_kept_and_their_rows_merged(tmp_path: Path) -> None:
    store = Store(tmp_path / "state", tmp_path / "results" / "quality.json")
    row = dict.fromkeys(FIELDS, 0)
    store.finish("main", [row | {"recipe": "main"}], {"seconds": 3})
    with pytest.raises(ValueError, match=r"rows of 'other' lack \['mfu'\]"):
        store.finish("other", [{name: 0 for name in FIELDS if name != "mfu"}], {})
    again = Store(tmp_path / "state", tmp_path / "results" / "quality.json")
    assert again.done("other") is None
    assert again.done("main") == {"rows": [row | {"recipe": "main"}], "notes": {"seconds": 3}}
    again.finish("ablation-00-seed0", [row], {})
    merged = json.loads((tmp_path / "results" / "quality.json").read_text())
    assert [(one["case"], one["recipe"]) for one in merged] == [("ablation-00-seed0", 0), ("main", "main")]
    assert json.loads((tmp_path / "results" / "quality.run.json").read_text())["main"] == {"seconds": 3}


def test_responses_and_drafts_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path, tmp_path / "out.json")
    responses = [Response((5, 6), (7,), (8, 9)), Response((1,), (49151, 2), ())]
    store.keep_responses({"train": responses, "gsm8k@0": []})
    again = Store(tmp_path, tmp_path / "out.json")
    assert again.names == ["gsm8k@0", "train"]
    assert again.responses("train") == responses
    assert again.responses("gsm8k@0") == []
    draft = tiny_pair()[1]
    store.keep_draft("main", draft)
    for name, tensor in again.draft("main").state_dict().items():
        torch.testing.assert_close(tensor, draft.state_dict()[name], rtol=2**-7, atol=0)


def test_every_line_of_the_table_has_three_seeds() -> None:
    names = [name for name in cases() if name.startswith("ablation-")]
    assert len(names) == len(set(names)) == 3 * len(ABLATIONS)
    assert {name[-1] for name in names} == {"0", "1", "2"}
