"""Responses that broke off and go on: what was sent is kept, and the rest is as if nothing had happened."""

from __future__ import annotations

import dataclasses

import pytest

from tests.component.test_diffusion_engine import DECODERS, engine
from tests.diffusion_tools import MASK, VOCAB, request
from unmask.decoding.request import DecodeRequest
from unmask.errors import PromptError
from unmask.types import TokenDelta


def deltas(asked: DecodeRequest, name: str) -> list[TokenDelta]:
    """What is streamed for one request."""
    running = engine()
    running.submit(asked, DECODERS[name])
    found = []
    while running.has_work:
        found += [output.delta for output in running.step()]
    return found


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_response_goes_on_where_it_broke_off(name: str, temperature: float) -> None:
    resumed = 0
    for seed in range(3):
        asked = request(5, 19, seed=seed, temperature=temperature, ignore_eos=seed % 2 == 0)
        whole = deltas(asked, name)
        sent: list[int] = []
        for position, delta in enumerate(whole[:-1], start=1):
            sent += delta.token_ids
            rest = deltas(dataclasses.replace(asked, prefix=tuple(sent)), name)
            assert [t for d in rest for t in d.token_ids] == [t for d in whole[position:] for t in d.token_ids]
            assert rest[-1].finish_reason == whole[-1].finish_reason
            resumed += 1
    assert resumed >= 2


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("known", [1, 4, 7, 18])
def test_a_prefix_of_any_length_is_kept_and_not_sent_again(name: str, known: int) -> None:
    asked = dataclasses.replace(request(5, 19, seed=3, ignore_eos=True), prefix=tuple(range(20, 20 + known)))
    rest = [token for delta in deltas(asked, name) for token in delta.token_ids]
    assert len(rest) == 19 - known
    assert MASK not in rest
    running = engine()
    (done,) = running.run([asked], DECODERS[name])
    assert done.response_ids == [*asked.prefix, *rest]


@pytest.mark.parametrize("prefix", [(MASK,), (VOCAB,), (-1,), tuple(range(9))])
def test_an_impossible_prefix_is_refused(prefix: tuple[int, ...]) -> None:
    with pytest.raises(PromptError, match="prefix"):
        engine().submit(dataclasses.replace(request(5, 9), prefix=prefix), DECODERS["d2f"])
