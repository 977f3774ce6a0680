from __future__ import annotations

import json

import pytest

from serve_app.replicas import can_resume, rest_of
from unmask.types import SamplingOptions


@pytest.mark.parametrize(
    ("options", "num_sent", "expected"),
    [
        ({}, 0, True),
        ({}, 5, True),
        ({}, 10, False),
        ({"seed": 3, "temperature": 1.0}, 5, True),
        ({"presence_penalty": 0.5}, 0, True),
        ({"presence_penalty": 0.5}, 5, False),
        ({"frequency_penalty": -0.5}, 5, False),
        ({"json_schema": json.dumps({})}, 5, False),
    ],
)
def test_what_can_go_on_elsewhere(options: dict, num_sent: int, expected: bool):
    assert can_resume(SamplingOptions(max_tokens=10, **options), num_sent) is expected


def test_what_is_left_to_do():
    options = SamplingOptions(max_tokens=10, seed=3, temperature=1.0, top_p=0.5)
    assert rest_of(options, 0) is options
    rest = rest_of(options, 4)
    assert (rest.max_tokens, rest.top_p) == (6, 0.5)
    assert rest.seed != options.seed
    assert rest_of(SamplingOptions(max_tokens=10), 4).seed is None
