"""Word problems: right answers, split by template, the same in every run."""

from __future__ import annotations

import itertools
import re

import pytest

from unmask.word_problems import MOST, word_problem_rows


def rows(split: str, count: int = 2000) -> list[dict[str, str]]:
    return list(itertools.islice(word_problem_rows(split), count))


def test_every_equation_holds_and_leads_to_the_answer() -> None:
    for row in rows("train"):
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["response"])
        assert len(equations) == row["template"].count("-") + 1
        before = re.search(r"\d+", row["prompt"])[0]
        for left, operator, right, result in equations:
            assert left == before
            value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}[operator]
            assert value(int(left), int(right)) == int(result) <= MOST
            before = result
        assert row["response"].endswith(f"The answer is {row['answer']}.")
        assert before == row["answer"]


def test_splits_share_no_template_and_runs_are_equal() -> None:
    train, test = rows("train"), rows("test")
    assert not {row["template"] for row in train} & {row["template"] for row in test}
    assert rows("test") == test
    with pytest.raises(ValueError, match="train, test"):
        next(word_problem_rows("new"))
