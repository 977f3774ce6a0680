from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.diffusion_tools import LLADA, random_ids, request, tiny
from unmask.decoding.apd import APD, APDConfig
from unmask.decoding.d2f import D2F, D2FConfig
from unmask.decoding.decoder import Decoder
from unmask.decoding.dparallel import DParallel, DParallelConfig
from unmask.decoding.engine import DiffusionEngine, EngineConfig
from unmask.decoding.generate import generate
from unmask.decoding.logits import Logits, digest_reference
from unmask.decoding.threshold import Threshold, ThresholdConfig
from unmask.masking.attention import Full
from unmask.masking.block_causal import BlockCausal
from unmask.masking.double_stream import DoubleStream
from unmask.models import llada
from unmask.models.transformer import DiffusionLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(autouse=True)
def exact_matmul() -> Iterator[None]:
    """Float32 products in full precision: tokens are compared one by one."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("vocab_size", [5, 97, 49152, 126464])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
def test_one_pass_over_the_vocabulary_equals_the_reference(
    vocab_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    raw = (6 * torch.randn(3, 7, vocab_size, generator=generator, device="cuda")).to(dtype)
    raw[0, 0] = -torch.inf
    raw[0, 0, 3] = 2.0
    raw[1, 1] = 0.0
    for forbidden in (None, 0, vocab_size - 1, vocab_size + 5):
        found = Logits(raw, forbidden)
        best, logsumexp, entropy = digest_reference(found.values_BKV)
        assert torch.equal(found.values_BKV.gather(-1, found.best_BK[..., None]), found.values_BKV.max(-1, True).values)
        torch.testing.assert_close(found.entropy_BK, entropy, atol=1e-4, rtol=1e-4)
        chosen = found.values_BKV.gather(-1, best[..., None])[..., 0]
        torch.testing.assert_close(found.probability(best), (chosen - logsumexp).exp(), atol=1e-4, rtol=1e-4)


def test_a_row_that_is_no_number_is_never_certain() -> None:
    raw = torch.zeros(1, 3, 97, device="cuda")
    raw[0, 0] = torch.nan
    raw[0, 1, 5] = torch.inf
    found = Logits(raw, 0)
    assert not (found.entropy_BK[0, :2] <= 1e9).any()
    assert (found.best_BK != 0).all()
    assert (found.probability(found.best_BK)[0, :2].isnan()).all()


def decoders() -> dict[str, Decoder]:
    bidirectional, shifted = tiny("llada").cuda(), tiny("dream").cuda()
    block_causal = tiny("adapted", attention="block_causal", block_size=2).cuda()
    return {
        "dparallel": DParallel(shifted, DParallelConfig(block_size=4, threshold=1.5)),
        "dual": Threshold(bidirectional, ThresholdConfig(block_size=4, threshold=0.4, cache="dual")),
        "d2f": D2F(block_causal, D2FConfig(block_size=4, tau_add=0.3, tau_act=0.7, tau_conf=0.35)),
        "apd": APD(
            shifted,
            tiny("causal", seed=1).cuda(),
            APDConfig(mixture_weight=0.7, kv_window=3, max_lookahead=7),
        ),
    }


@pytest.mark.parametrize("name", ["dparallel", "dual", "d2f", "apd"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_engine_agrees_with_the_plain_loop(name: str, cuda_graphs: bool) -> None:
    decoder = decoders()[name]
    requests = [
        request(3 + seed % 5, 10 + seed % 7, seed=seed, temperature=0.8 * (seed % 3 == 0), top_p=0.9)
        for seed in range(12)
    ]
    config = EngineConfig(max_rows=5, max_length=64, cuda_graphs=cuda_graphs, max_graphs=6)
    engine = DiffusionEngine(decoder.cached_models, config)
    done = {completion.request_id: completion for completion in engine.run(requests, decoder)}
    assert done == {asked.request_id: generate(decoder, [asked])[0] for asked in requests}


@pytest.mark.parametrize("name", ["dparallel", "dual", "d2f", "apd"])
def test_a_step_never_synchronises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoders()[name]
    step = type(decoder).step

    def watched(self: Decoder, *args: object) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(type(decoder), "step", watched)
    requests = [request(4, 9, seed=1), request(6, 12, seed=2, temperature=0.7, top_p=0.9)]
    engine = DiffusionEngine(decoder.cached_models, EngineConfig(max_rows=2, max_length=64))
    assert len(list(engine.run(requests, decoder))) == 2


@pytest.mark.parametrize("kind", ["full", "block_causal", "double_stream"])
def test_flex_attention_trains_like_the_dense_mask(kind: str) -> None:
    size = 128
    lengths = torch.tensor([size, 100], device="cuda")
    blocks = BlockCausal(torch.tensor([20, 33], device="cuda"), 16, lengths)
    halves = BlockCausal(torch.tensor([5, 9], device="cuda"), 8, torch.tensor([64, 50], device="cuda"))
    mask = {"full": Full(lengths), "block_causal": blocks, "double_stream": DoubleStream(halves, size // 2)}[kind]
    network = _wide_heads()
    ids = random_ids(2, size).cuda()
    positions = torch.arange(size, device="cuda").expand(2, -1)
    visible = torch.arange(size, device="cuda") < lengths.min()

    def gradient(flex: bool) -> tuple[torch.Tensor, torch.Tensor]:
        network.use_flex_attention = flex
        network.zero_grad()
        logits = network(ids, positions, mask=mask)[:, visible]
        logits.log_softmax(-1)[..., 0].mean().backward()
        return logits.detach(), network.model.layers[0].self_attn.q_proj.weight.grad.clone()

    for flex, dense in zip(gradient(flex=True), gradient(flex=False), strict=True):
        torch.testing.assert_close(flex, dense, atol=2e-3, rtol=2e-2)


def _wide_heads() -> DiffusionLM:
    """Heads of 16, the least that compiled flex attention takes."""
    return llada.build({**LLADA, "d_model": 64}, std=0.1).cuda()
