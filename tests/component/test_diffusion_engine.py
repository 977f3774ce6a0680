from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.diffusion_tools import EOS, MASK, request, tiny
from unmask.decoding.batch import Window
from unmask.decoding.decoder import Decoder
from unmask.decoding.engine import DiffusionEngine, EngineConfig, EngineFull
from unmask.decoding.generate import generate
from unmask.decoding.grouping import Limits, _cheapest_cuts, group
from unmask.decoding.registry import build_decoder
from unmask.decoding.request import Completion, DecodeRequest
from unmask.decoding.slots import Slots
from unmask.decoding.work import Work, assemble, shape_of
from unmask.errors import ConfigError, PromptError
from unmask.types import SamplingOptions

BIDIRECTIONAL = {family: tiny(family) for family in ("llada", "dream")}
BLOCK_CAUSAL = tiny("adapted", attention="block_causal", block_size=2)
VERIFIER = tiny("causal", seed=1)
MODELS = [*BIDIRECTIONAL.values(), BLOCK_CAUSAL, VERIFIER]


def decoder(name: str, **knobs: Any) -> Decoder:
    network = BLOCK_CAUSAL if name == "d2f" else BIDIRECTIONAL[knobs.pop("family", "dream")]
    return build_decoder({"name": name, **knobs}, network, verifier=VERIFIER)


DECODERS = {
    "one_token": decoder("one_token", block_size=5),
    "threshold": decoder("threshold", block_size=4, threshold=0.4, family="llada"),
    "prefix": decoder("threshold", block_size=4, threshold=0.4, cache="prefix"),
    "dual": decoder("threshold", block_size=6, factor=1.0, cache="dual", family="llada"),
    "dparallel": decoder("dparallel", block_size=4, threshold=1.5),
    "dparallel_dual": decoder("dparallel", block_size=4, threshold=1.5, cache="dual"),
    "d2f": decoder("d2f", block_size=4, tau_add=0.3, tau_act=0.7, tau_conf=0.35),
    "d2f_uncached": decoder("d2f", block_size=4, tau_add=0.3, tau_act=0.7, tau_conf=0.35, cache=False),
    "apd": decoder("apd", mixture_weight=0.7, kv_window=3, max_lookahead=7),
    "apd_uncached": decoder("apd", mixture_weight=0.7, kv_window=None, max_lookahead=9, family="llada"),
}
ALONE: dict[tuple[str, str], Completion] = {}
arrivals = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.integers(1, 16),
        st.integers(0, 30),
        st.sampled_from([0.0, 0.0, 0.8]),
        st.integers(0, 8),
    ),
    min_size=1,
    max_size=7,
    unique_by=lambda arrival: arrival[:4],
)


def alone(name: str, asked: DecodeRequest) -> Completion:
    """The request's completion in a batch of its own."""
    key = name, asked.request_id
    if key not in ALONE:
        (ALONE[key],) = generate(DECODERS[name], [asked])
    return ALONE[key]


def engine(**config: Any) -> DiffusionEngine:
    return DiffusionEngine(MODELS, EngineConfig(**{"max_rows": 3, "max_length": 64, **config}))


def drain(running: DiffusionEngine, waiting: list[tuple[int, DecodeRequest, Decoder]]) -> dict[str, Completion]:
    """Step until all is done, submitting each request at its step; checks what is streamed on the way."""
    streamed: dict[str, list[int]] = defaultdict(list)
    completions: dict[str, Completion] = {}
    step = 0
    while waiting or running.has_work:
        for _, asked, used in [item for item in waiting if item[0] <= step]:
            running.submit(asked, used)
        waiting = [item for item in waiting if item[0] > step]
        step += 1
        for output in running.step():
            assert output.request_id not in completions
            streamed[output.request_id] += output.delta.token_ids
            assert (output.delta.finish_reason is not None) == (output.completion is not None)
            if output.completion is not None:
                completions[output.request_id] = output.completion
                assert streamed[output.request_id] == output.completion.response_ids
    return completions


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(arrived=arrivals)
def test_a_row_is_the_same_in_any_company(name: str, arrived: list[tuple[int, int, int, float, int]]) -> None:
    requests = [
        (step, request(prompt, most, seed=seed, temperature=temperature))
        for prompt, most, seed, temperature, step in arrived
    ]
    done = drain(engine(), [(step, asked, DECODERS[name]) for step, asked in requests])
    assert done == {asked.request_id: alone(name, asked) for _, asked in requests}


@pytest.mark.parametrize("name", DECODERS)
def test_an_eos_in_the_prompt_stops_nothing(name: str) -> None:
    asked = [
        DecodeRequest(request_id=str(seed), prompt_ids=(EOS, seed, EOS), options=SamplingOptions(max_tokens=9))
        for seed in range(6)
    ]
    completions = list(engine().run(asked, DECODERS[name]))
    assert any(completion.finish_reason == "length" for completion in completions)
    for completion in completions:
        assert (completion.finish_reason == "stop") == (EOS in completion.response_ids)
        assert completion.finish_reason == "stop" or len(completion.response_ids) == 9


def test_decoders_run_side_by_side() -> None:
    asked = {name: request(2 + index, 9 + index, seed=index) for index, name in enumerate(DECODERS)}
    running = engine(max_rows=len(DECODERS))
    done = drain(running, [(0, asked[name], DECODERS[name]) for name in DECODERS])
    assert done == {asked[name].request_id: alone(name, asked[name]) for name in DECODERS}


@pytest.mark.parametrize("config", [{"max_fed_columns": 64}, {"shape_multiple": 1}, {"shape_multiple": 40}])
def test_bounds_and_shapes_change_the_work_and_not_the_result(config: dict[str, int]) -> None:
    requests = [request(5, 12, seed=seed) for seed in range(5)]
    running = engine(max_rows=5, **config)
    done = {completion.request_id: completion for completion in running.run(requests, DECODERS["d2f"])}
    assert done == {asked.request_id: alone("d2f", asked) for asked in requests}


def test_forwards_are_cut_to_the_column_bound() -> None:
    requests = [request(5, 12, seed=seed) for seed in range(5)]
    wide, narrow = engine(max_rows=5), engine(max_rows=5, max_fed_columns=64)
    for running in (wide, narrow):
        list(running.run(requests, DECODERS["one_token"]))
    assert wide.num_batches == wide.num_steps
    assert narrow.num_batches > 2 * narrow.num_steps


def test_memory_is_allocated_once_and_for_all() -> None:
    running = engine()
    before = running.slots.num_bytes
    assert before == sum(model.new_cache(3, 64).num_bytes for model in MODELS)
    for name in ("d2f", "apd", "dual"):
        list(running.run([request(4, 12, seed=seed) for seed in range(6)], DECODERS[name]))
    assert running.slots.num_bytes == before
    assert running.slots.num_free == 3


def test_rows_that_finish_make_room_for_those_that_wait() -> None:
    running = engine(max_rows=2)
    for seed in range(5):
        running.submit(request(3, 4 + seed, seed=seed), DECODERS["one_token"])
    assert (running.num_running, running.num_waiting) == (0, 5)
    running.step()
    assert (running.num_running, running.num_waiting) == (2, 3)
    assert len(drain(running, [])) == 5
    assert not running.has_work
    assert running.step() == []


def test_an_abort_frees_the_row_and_touches_no_other() -> None:
    asked = [request(3, 12, seed=seed) for seed in range(4)]
    running = engine(max_rows=2)
    for one in asked:
        running.submit(one, DECODERS["d2f"])
    running.step()
    assert running.abort(asked[0].request_id)
    assert running.abort(asked[3].request_id)
    assert not running.abort("unknown")
    done = drain(running, [])
    assert done == {one.request_id: alone("d2f", one) for one in asked[1:3]}


@pytest.mark.parametrize("name", DECODERS)
def test_overlapped_steps_change_no_row(name: str) -> None:
    asked = [request(3 + seed % 4, 9 + seed, seed=seed, temperature=0.8 * (seed % 2)) for seed in range(7)]
    running = engine(max_rows=3, overlap=True)
    for one in asked[:5]:
        running.submit(one, DECODERS[name])
    done = {}
    while running.has_work:
        done |= {output.request_id: output.completion for output in running.step() if output.completion}
        if running.num_steps == 1:
            assert running.abort(asked[1].request_id), "its forward is under way, and its slot goes to another row"
        if running.num_steps in (2, 3):
            running.submit(asked[3 + running.num_steps], DECODERS[name])
    assert done == {one.request_id: alone(name, one) for one in asked if one is not asked[1]}
    assert running.slots.num_free == 3


def test_an_overlapped_step_starts_the_next_forward_first() -> None:
    used, order = decoder("one_token", block_size=4), []
    step = used.step
    used.step = lambda *args: (order.append("started"), step(*args))[1]
    running = engine(overlap=True)
    running.submit(request(3, 12, ignore_eos=True), used)
    for _ in range(3):
        running.step()
        order.append("told")
    assert order == ["started", "started", "told", "started", "told", "started", "told"]


def test_a_row_aborted_in_flight_leaves_nothing_behind() -> None:
    running = engine(overlap=True)
    running.submit(request(3, 12, seed=1), DECODERS["d2f"])
    running.step()
    assert running.abort(request(3, 12, seed=1).request_id)
    assert not running.has_work
    asked = request(4, 12, seed=2)
    running.submit(asked, DECODERS["d2f"])
    assert drain(running, []) == {asked.request_id: alone("d2f", asked)}


def test_a_full_queue_says_so() -> None:
    running = engine(max_waiting=2)
    for seed in range(2):
        running.submit(request(3, 4, seed=seed), DECODERS["one_token"])
    with pytest.raises(EngineFull, match="2 requests wait"):
        running.submit(request(3, 4, seed=2), DECODERS["one_token"])


@pytest.mark.parametrize(
    ("asked", "name", "error", "words"),
    [
        (request(30, 40), "one_token", ConfigError, "70 columns exceed the engine's 64"),
        (request(3, 400), "one_token", ConfigError, "exceed the model's 256"),
        (DecodeRequest(request_id="r", prompt_ids=(1, MASK)), "d2f", PromptError, "mask token"),
        (DecodeRequest(request_id="r", prompt_ids=()), "apd", PromptError, "empty"),
    ],
)
def test_what_cannot_run_is_refused_when_submitted(
    asked: DecodeRequest, name: str, error: type[Exception], words: str
) -> None:
    running = engine()
    with pytest.raises(error, match=words):
        running.submit(asked, DECODERS[name])
    assert not running.has_work


def test_a_decoder_needs_a_cache_and_room_for_its_logits() -> None:
    running = DiffusionEngine([BLOCK_CAUSAL], EngineConfig(max_rows=1, max_length=64, max_logits_mb=1))
    with pytest.raises(ConfigError, match="no cache in this engine"):
        running.submit(request(3, 4), DECODERS["dual"])
    with pytest.raises(ConfigError, match="raise max_logits_mb"):
        running.submit(request(3, 4), decoder("d2f", block_size=2000))


@pytest.mark.parametrize("config", [{"max_rows": 0}, {"max_length": 100, "max_fed_columns": 99}])
def test_impossible_bounds_are_refused(config: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(**config)


def test_eos_padding_is_not_streamed() -> None:
    asked = next(
        asked for seed in range(99) if EOS in alone("dparallel", asked := request(4, 16, seed=seed)).response_ids
    )
    (completion,) = engine().run([asked], DECODERS["dparallel"])
    assert completion.response_ids.index(EOS) == len(completion.response_ids) - 1
    assert completion.num_text_tokens == len(completion.response_ids) - 1


class NoSynchronisation(TorchDispatchMode):
    """Refuses the operations that make a host wait for its device, or give tensors data-dependent shapes."""

    waiting = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.waiting, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", DECODERS)
def test_a_step_never_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = DECODERS[name]
    step = type(used).step

    def watched(self: Decoder, *args: Any) -> torch.Tensor:
        with NoSynchronisation():
            return step(self, *args)

    monkeypatch.setattr(type(used), "step", watched)
    requests = [request(3, 9, seed=1), request(5, 7, seed=2, temperature=0.7, top_p=0.9)]
    assert len(list(engine().run(requests, used))) == 2


def work(name: str, width: int, open_width: int = 4) -> Work:
    state = DECODERS[name].admit(request(3, 60), slot=0)
    return Work(DECODERS[name], state, Window(start=0, stop=width, open_start=0, open_stop=open_width, visible=width))


def limits(**changes: Any) -> Limits:
    wide = {"capacity": 64, "fed_columns": 10**6, "logits_bytes": 1 << 30, "multiple": 8, "rows_power_of_two": False}
    return Limits(**{**wide, **changes})


@pytest.mark.parametrize(
    ("overhead", "expected"),
    [
        (0, [[60], [50], [33], [6, 4, 4]]),
        (48, [[60, 50, 33], [6, 4, 4]]),
        (1000, [[60, 50, 33, 6, 4, 4]]),
    ],
)
def test_rows_share_a_forward_where_padding_costs_less(overhead: int, expected: list[list[int]]) -> None:
    items = [work("dual", width) for width in (4, 60, 6, 33, 50, 4)]
    groups = group(items, limits(), lambda decoder: overhead)
    assert [[item.window.width for item in members] for members in groups] == expected


@given(widths=st.lists(st.integers(1, 60), min_size=1, max_size=7), overhead=st.integers(0, 200), rounded=st.booleans())
def test_no_other_cuts_cost_less(widths: list[int], overhead: int, rounded: bool) -> None:
    bounds = limits(rows_power_of_two=rounded)

    def cost(members: Sequence[Work]) -> int:
        shape = bounds.shape_of(members)
        return overhead + shape.num_rows * shape.width

    items = sorted((work("dual", width) for width in widths), key=lambda item: -item.window.width)
    found = sum(cost(items[a:b]) for a, b in _cheapest_cuts(items, bounds, overhead))
    # Rows of one width stay together.
    width = [bounds.shape_of([item]).width for item in items]
    borders = [i for i in range(1, len(items)) if width[i] < width[i - 1]]
    every = itertools.chain.from_iterable(itertools.combinations(borders, n) for n in range(len(borders) + 1))
    least = min(sum(cost(items[a:b]) for a, b in itertools.pairwise([0, *cuts, len(items)])) for cuts in every)
    assert found == least


def test_rows_of_similar_width_have_a_shape_of_their_own() -> None:
    groups = group([work("dual", width) for width in (4, 60, 6, 33, 50, 4)], limits(), lambda decoder: 48)
    shapes = [limits().shape_of(members) for members in groups]
    assert [(shape.num_rows, shape.width, shape.num_keys) for shape in shapes] == [(3, 64, 64), (3, 8, 8)]


def test_decoders_never_share_a_forward() -> None:
    groups = group([work("dual", 8), work("d2f", 8), work("dual", 8)], limits(), lambda decoder: 1000)
    assert sorted(len(members) for members in groups) == [1, 2]


def test_forwards_stay_within_their_limits() -> None:
    items = [work("dual", 50) for _ in range(9)]
    few_columns = limits(fed_columns=3 * 56)
    assert [len(members) for members in group(items, few_columns, lambda decoder: 0)] == [3, 3, 3]
    few_logits = limits(logits_bytes=2 * 6 * 41 * 4)
    assert [len(members) for members in group(items, few_logits, lambda decoder: 0)] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("name", DECODERS)
def test_padding_rows_and_columns_change_nothing(name: str) -> None:
    used = DECODERS[name]
    asked = [request(3 + seed, 12, seed=seed) for seed in range(3)]
    tokens = []
    for padded in (False, True):
        slots = Slots(used.cached_models, num_rows=3, capacity=40)
        members = [Work.of(used, used.admit(one, slot)) for slot, one in enumerate(asked)]
        shape = shape_of(members, 40, multiple=32 if padded else 1, rows_power_of_two=padded)
        with torch.inference_mode():
            stepped = used.step(assemble(members, shape, slots).unpack(), slots.caches)
        widths = [item.window.open_stop - item.window.open_start for item in members]
        tokens.append([row[:width].tolist() for row, width in zip(stepped, widths, strict=False)])
        assert len(stepped) == (4 if padded else 3)
    assert tokens[0] == tokens[1]


def test_static_shapes_round_rows_up() -> None:
    shape = limits(multiple=16, rows_power_of_two=True).shape_of([work("d2f", 17, open_width=5) for _ in range(5)])
    assert (shape.num_rows, shape.width, shape.open_width, shape.num_keys) == (8, 32, 8, 32)
