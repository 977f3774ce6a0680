from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.diffusion_tools import DREAM, EOS, LLADA, MASK, VOCAB, everything, random_ids, raw_rows, tiny
from unmask.errors import CheckpointError, ConfigError
from unmask.masking.attention import Causal, Full
from unmask.models import adapted, dream, families, llada
from unmask.models.transformer import DiffusionLM

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": EOS, "bos_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CAUSAL_LMS = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biased": transformers.LlamaConfig(**SIZES, attention_bias=True, head_dim=16),
    "llama-3.1": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
}


def hugging_face(name: str) -> transformers.PreTrainedModel:
    """A random causal LM with every parameter, biases and norms too, away from its default."""
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL_LMS[name]).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def rows(network: DiffusionLM, ids: torch.Tensor, mask: object) -> torch.Tensor:
    with torch.inference_mode():
        return network(ids, torch.arange(ids.shape[1]).expand_as(ids), mask=mask)


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_a_causal_lm_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = hugging_face(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    network = families.load(tmp_path)
    ids = random_ids(2, 50)
    with torch.inference_mode():
        expected = model(ids).logits
    torch.testing.assert_close(rows(network, ids, Causal()), expected, atol=1e-4, rtol=1e-4)
    assert (network.attention, network.mask_id, network.eos_ids) == ("causal", None, (EOS,))


def test_dream_is_qwen2_with_full_attention(tmp_path: Path) -> None:
    network = tiny("dream")
    dream.save(network, tmp_path)
    config = transformers.Qwen2Config(**SIZES, rms_norm_eps=1e-6, rope_theta=10000.0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    ids = random_ids(2, 20)
    visible = torch.zeros(2, 1, 20, 20)
    with torch.inference_mode():
        expected = model(ids, attention_mask=visible).logits
    torch.testing.assert_close(rows(network, ids, Full()), expected, atol=1e-4, rtol=1e-4)


def llada_reference(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """LLaDA's forward for one row, in its published names and the plainest operations."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    def rotary(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        half = x.shape[-1] // 2
        for position in range(x.shape[0]):
            for j in range(half):
                angle = torch.tensor(position / 10000.0 ** (2 * j / x.shape[-1]))
                a, b = x[position, :, j], x[position, :, j + half]
                out[position, :, j] = a * angle.cos() - b * angle.sin()
                out[position, :, j + half] = b * angle.cos() + a * angle.sin()
        return out

    x = weights["model.transformer.wte.weight"][ids]
    for layer in range(2):
        name = f"model.transformer.blocks.{layer}"
        w = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        h = norm(x, f"{name}.attn_norm")
        q = rotary((h @ w["q_proj.weight"].T).view(len(ids), 4, 8))
        k = rotary((h @ w["k_proj.weight"].T).view(len(ids), 2, 8)).repeat_interleave(2, dim=1)
        v = (h @ w["v_proj.weight"].T).view(len(ids), 2, 8).repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["attn_out.weight"].T
        h = norm(x, f"{name}.ff_norm")
        x = x + (F.silu(h @ w["ff_proj.weight"].T) * (h @ w["up_proj.weight"].T)) @ w["ff_out.weight"].T
    return norm(x, "model.transformer.ln_f") @ weights["model.transformer.ff_out.weight"].T


def test_llada_computes_what_its_published_tensors_mean(tmp_path: Path) -> None:
    network = tiny("llada")
    llada.save(network, tmp_path)
    ids = random_ids(1, 11)
    expected = llada_reference(load_file(tmp_path / "model.safetensors"), ids[0])
    torch.testing.assert_close(rows(network, ids, Full())[0], expected, atol=1e-4, rtol=1e-4)


def test_published_tensor_names(tmp_path: Path) -> None:
    in_layer = ["attn_norm", "attn_out", "ff_norm", "ff_out", "ff_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    outer = ["model.transformer.ff_out.weight", "model.transformer.ln_f.weight", "model.transformer.wte.weight"]
    expected = [f"model.transformer.blocks.{i}.{name}.weight" for i in range(2) for name in in_layer] + outer
    llada.save(tiny("llada"), tmp_path / "llada")
    assert sorted(load_file(tmp_path / "llada" / "model.safetensors")) == expected

    dream.save(tiny("dream"), tmp_path / "dream")
    qwen2 = transformers.Qwen2ForCausalLM(CAUSAL_LMS["qwen2"])
    assert set(load_file(tmp_path / "dream" / "model.safetensors")) == set(qwen2.state_dict())


@pytest.mark.parametrize("family", ["llada", "dream", "adapted"])
def test_a_saved_network_comes_back_whole(family: str, tmp_path: Path) -> None:
    network = tiny(family, attention="block_causal", block_size=4)
    families.save(network, tmp_path)
    loaded = families.load(tmp_path)
    assert loaded.config == network.config
    assert (loaded.attention, loaded.block_size, loaded.mask_id, loaded.eos_ids) == ("block_causal", 4, MASK, (EOS,))
    ids = random_ids(2, 9)
    assert torch.equal(rows(loaded, ids, Full()), rows(network, ids, Full()))
    assert not list(tmp_path.glob("*.tmp"))
    assert families.load(tmp_path, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


def test_the_lm_head_runs_only_where_logits_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny("dream")
    seen = []
    project = network.project
    monkeypatch.setattr(network, "project", lambda hidden: seen.append(hidden.shape) or project(hidden))
    ids = random_ids(2, 30)
    network(ids, torch.arange(30).expand(2, -1), mask=Full(), logits_at=torch.tensor([[4, 5], [9, 12]]))
    assert seen == [(2, 2, 32)]


def test_casting_a_network_leaves_its_positions_exact() -> None:
    network = tiny("llada")
    positions = torch.tensor([[0, 1, 200]])
    before = network.model.rotary(positions, torch.float32)
    after = network.bfloat16().model.rotary(positions, torch.float32)
    assert torch.equal(torch.stack(after), torch.stack(before))


def test_ids_and_stop_ids_come_from_the_checkpoint(tmp_path: Path) -> None:
    families.save(tiny("llada"), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 7]}))
    assert families.load(tmp_path).eos_ids == (EOS, 7)


def test_adapting_turns_an_unused_token_into_the_mask(tmp_path: Path) -> None:
    hugging_face("llama").save_pretrained(tmp_path / "causal")
    network = adapted.load(tmp_path / "causal")
    before = network.model.embed_tokens.weight.detach().clone()
    adapted.adapt(network, mask_id=5, attention="block_causal", block_size=8)
    after = network.model.embed_tokens.weight
    others = torch.arange(VOCAB) != 5
    assert torch.equal(after[others], before[others])
    assert (after[5] - before.mean(0)).abs().max() < 0.5 * before.std()

    adapted.save(network, tmp_path / "adapted")
    loaded = families.load(tmp_path / "adapted")
    assert (loaded.mask_id, loaded.attention, loaded.block_size) == (5, "block_causal", 8)
    config = json.loads((tmp_path / "adapted" / "config.json").read_text())
    known_to_engines = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert "LlamaForCausalLM" in known_to_engines
    assert not set(config["architectures"]) & set(known_to_engines)


@pytest.mark.parametrize(
    ("mask_id", "attention", "block_size"),
    [(VOCAB, "bidirectional", None), (EOS, "bidirectional", None), (5, "block_causal", None), (5, "bidirectional", 4)],
)
def test_impossible_adaptations_are_refused(mask_id: int, attention: str, block_size: int | None) -> None:
    with pytest.raises(ConfigError):
        adapted.adapt(tiny("causal"), mask_id=mask_id, attention=attention, block_size=block_size)


def test_adapters_train_and_switch_off(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    network = tiny("llada")
    ids = random_ids(1, 9)
    base = rows(network, ids, Full())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert sum("lora_B" in name for name, _ in wrapped.named_parameters()) == 2 * len(targets)
    assert not torch.allclose(rows(wrapped, ids, Full()), base)
    with wrapped.disable_adapter():
        torch.testing.assert_close(rows(wrapped, ids, Full()), base)
    with_adapters = rows(wrapped, ids, Full())
    merged = wrapped.merge_and_unload()
    families.save(merged, tmp_path)
    torch.testing.assert_close(rows(families.load(tmp_path), ids, Full()), with_adapters, atol=1e-4, rtol=1e-4)


class TestBrokenCheckpoints:
    """Each is refused in one line that says what is wrong."""

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        families.save(tiny("llada"), tmp_path)
        return tmp_path

    def tensors(self, directory: Path) -> dict[str, torch.Tensor]:
        return load_file(directory / "model.safetensors")

    def test_missing_tensor(self, directory: Path) -> None:
        tensors = self.tensors(directory)
        del tensors["model.transformer.blocks.1.up_proj.weight"]
        save_file(tensors, directory / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*mlp.up_proj"):
            families.load(directory)

    def test_unknown_tensor(self, directory: Path) -> None:
        tensors = self.tensors(directory)
        tensors["model.transformer.blocks.0.extra.weight"] = torch.zeros(1)
        save_file(tensors, directory / "model.safetensors")
        with pytest.raises(CheckpointError, match="unknown tensor"):
            families.load(directory)

    def test_wrong_shape(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"mlp_hidden_size": 64}))
        with pytest.raises(CheckpointError, match=r"config\.json does not fit"):
            families.load(directory)

    def test_damaged_file(self, directory: Path) -> None:
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="is damaged"):
            families.load(directory)

    def test_pickled_weights(self, directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="pickled weights are not read"):
            families.load(directory)

    def test_wrong_family(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
        with pytest.raises(CheckpointError, match="model_type 'gpt2'"):
            families.load(directory)
        with pytest.raises(CheckpointError, match="num_attention_heads"):
            dream.load(directory)

    def test_no_checkpoint_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no config.json"):
            families.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("module", "config", "change"),
    [
        (llada, LLADA, {"block_type": "sequential"}),
        (llada, LLADA, {"mask_token_id": None}),
        (dream, DREAM, {"use_sliding_window": True}),
        (adapted, CAUSAL_LMS["llama"].to_dict(), {"mlp_bias": True}),
        (adapted, CAUSAL_LMS["llama"].to_dict(), {"rope_parameters": {**LLAMA3_ROPE, "rope_type": "dynamic"}}),
        (adapted, CAUSAL_LMS["qwen2"].to_dict(), {"layer_types": ["sliding_attention"] * 2}),
    ],
)
def test_variants_that_would_compute_something_else_are_refused(
    module: object, config: dict[str, object], change: dict[str, object]
) -> None:
    with pytest.raises(CheckpointError):
        module.parse({**config, **change})


def test_references_agree_with_the_networks_own_masks() -> None:
    network = tiny("dream")
    ids = random_ids(1, 9)
    torch.testing.assert_close(raw_rows(network, ids[0].tolist(), everything), rows(network, ids, Full())[0])
