"""The embedded target against slow references, the safety of model directories, and target records."""

from __future__ import annotations

import json
import mmap
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from unmask import embedded_target
from unmask.config import EMBEDDED_TARGET
from unmask.embedded_target import _gguf_path
from unmask.errors import CheckpointError
from unmask.files import atomic_directory, verify_directory
from unmask.targets import describe_target, resolve_target, unused_special_token

Q4_1 = 3
_FORMS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Of GGUF's scalar types, by number."""


@pytest.fixture(scope="module")
def tokenizer(embedded: Path):
    return AutoTokenizer.from_pretrained(embedded)


@pytest.fixture
def model_dir(tmp_path: Path, light_target: Path) -> Path:
    """A directory with everything that a target needs, and one tensor."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(light_target / name, directory)
    return directory


@pytest.fixture(scope="module")
def gguf() -> dict[str, tuple[tuple[int, ...], memoryview]]:
    """Shape and bytes of each tensor of the GGUF file, read by the letter of its format, version 3."""
    with _gguf_path().open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    at = 4

    def take(form: str) -> Any:
        nonlocal at
        [value] = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> str:
        return take(f"{take('Q')}s").decode()

    def value(kind: int) -> object:
        if kind == 8:
            return text()
        if kind == 9:
            of, count = take("I"), take("Q")
            return [value(of) for _ in range(count)]
        return take(_FORMS[kind])

    assert (bytes(data[:4]), take("I")) == (b"GGUF", 3)
    num_tensors, num_fields = take("Q"), take("Q")
    for _ in range(num_fields):
        text()
        value(take("I"))
    found = []
    for _ in range(num_tensors):
        name, rank = text(), take("I")
        found.append((name, tuple(take("Q") for _ in range(rank)), take("I"), take("Q")))
    start = -(-at // 32) * 32
    return {name: (shape, data[start + offset :]) for name, shape, kind, offset in found if kind == Q4_1}


def q4_1_row(blocks: bytes) -> list[float]:
    """Slow reading of one row of Q4_1 blocks: 32 weights from a scale, a minimum and 16 bytes of nibbles."""
    weights: list[float] = []
    for at in range(0, len(blocks), 20):
        scale, minimum = np.frombuffer(blocks[at : at + 4], np.float16).astype(np.float32)
        nibbles = blocks[at + 4 : at + 20]
        weights += [float(scale * n + minimum) for n in [*(b & 15 for b in nibbles), *(b >> 4 for b in nibbles)]]
    return weights


@pytest.mark.parametrize(("part", "name"), [("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")])
def test_weights_equal_a_slow_reading_of_the_gguf(embedded: Path, gguf, part: str, name: str) -> None:
    (width, _), data = gguf[f"blk.3.{part}.weight"]
    with safe_open(embedded / "model.safetensors", "pt") as file:
        weight = file.get_tensor(f"model.layers.3.self_attn.{name}.weight")
    row_bytes = width // 32 * 20
    for row in (0, 1, 31, 32, 33, 64, 100, 191):
        head, inside = divmod(row, 64)
        # GGUF puts rows i and i + 32 of a head next to each other.
        stored = row if part == "attn_v" else head * 64 + 2 * (inside % 32) + inside // 32
        row_data = bytes(data[stored * row_bytes : (stored + 1) * row_bytes])
        expected = torch.tensor(q4_1_row(row_data)).to(torch.bfloat16)
        assert torch.equal(weight[row], expected)


def test_target_answers_in_english(embedded: Path, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


def test_tokenizer_knows_its_special_tokens(tokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 4, 16]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<reponame>",
        "<empty_output>",
    ]
    assert sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special) == list(range(17))
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("text", ["a  12 apples", " 345", "h\u00e9llo \u4e16\u754c", "\n\n x1y2", "\U0001f600"])
def test_tokenizer_splits_digits_and_loses_nothing(tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(sum(c.isdigit() for c in tokenizer.decode([i])) <= 1 for i in ids)


@pytest.mark.parametrize("convert", ["by copying", pytest.param("for real", marks=pytest.mark.slow)])
def test_damaged_cache_is_rebuilt(
    embedded: Path, light_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: str
) -> None:
    source = embedded
    if convert == "by copying":
        source = light_target
        monkeypatch.setattr(
            embedded_target, "_convert", lambda _, building: shutil.copytree(source, building, dirs_exist_ok=True)
        )
    damaged = tmp_path / embedded.name
    with atomic_directory(damaged) as building:
        shutil.copy(source / "tokenizer.json", building)
    (damaged / "tokenizer.json").write_text("{}")
    assert not verify_directory(damaged)
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path))
    rebuilt = resolve_target(EMBEDDED_TARGET)
    assert rebuilt == damaged
    assert verify_directory(rebuilt)
    assert describe_target(rebuilt) == describe_target(source)
    assert [path.name for path in tmp_path.iterdir()] == [embedded.name]
    before = (rebuilt / "config.json").stat().st_mtime_ns
    assert resolve_target(EMBEDDED_TARGET) == rebuilt
    assert (rebuilt / "config.json").stat().st_mtime_ns == before


def test_record_holds_sizes_and_follows_the_content(model_dir: Path) -> None:
    record = describe_target(model_dir)
    assert (record.vocab_size, record.hidden_size, record.num_layers) == (49152, 576, 30)
    assert record.revision.startswith("sha256:")
    save_file({"weight": torch.ones(2)}, model_dir / "model.safetensors")
    assert describe_target(model_dir).revision != record.revision
    (model_dir / "chat_template.jinja").write_text("{{ messages }}")
    changed = describe_target(model_dir)
    assert changed.chat_template_hash != record.chat_template_hash
    assert changed.tokenizer_hash == record.tokenizer_hash


def test_record_of_a_hub_snapshot_is_its_commit(model_dir: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = model_dir.parent / "snapshots" / commit
    snapshot.parent.mkdir()
    model_dir.rename(snapshot)
    assert describe_target(snapshot).revision == commit


def _drop_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _need_code(directory: Path) -> None:
    tree = json.loads((directory / "config.json").read_text())
    tree |= {"model_type": "novel", "auto_map": {"AutoConfig": "configuration_novel.NovelConfig"}}
    (directory / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_weights, "'pytorch_model.bin' is a pickle"),
        (_need_code, "needs code from its repository"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no *.safetensors"),
        (lambda d: (d / "config.json").unlink(), "is missing"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
)
def test_unsafe_or_incomplete_directories_are_refused(model_dir: Path, damage, message: str) -> None:
    assert resolve_target(str(model_dir)) == model_dir
    damage(model_dir)
    with pytest.raises(CheckpointError, match=r"^target\.model: ") as error:
        resolve_target(str(model_dir))
    assert message in str(error.value)


def test_names_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean 'embedded:smollm2-135m-instruct'"):
        resolve_target("embedded:smollm2-135m")
    with pytest.raises(CheckpointError, match="not a directory"):
        resolve_target(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="could not be fetched"):
        resolve_target("not a/hub id!")


def _token(content: str, special: bool = True) -> SimpleNamespace:
    return SimpleNamespace(content=content, special=special)


def test_mask_token_is_unused(tokenizer) -> None:
    mask = unused_special_token(tokenizer)
    assert mask == unused_special_token(tokenizer)
    assert 3 <= mask <= 16
    rendered = tokenizer.apply_chat_template(
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert tokenizer.convert_ids_to_tokens(mask) not in rendered + tokenizer.chat_template


def test_mask_token_prefers_reserved_names_and_skips_template_tokens() -> None:
    tokens = {5: _token("<a>"), 6: _token("<turn>"), 9: _token("<|reserved_1|>"), 8: _token("<unused>", special=False)}
    fake = SimpleNamespace(
        mask_token_id=None,
        bos_token_id=5,
        eos_token_id=None,
        pad_token_id=None,
        unk_token_id=None,
        chat_template="<turn>{{ x }}",
        added_tokens_decoder=tokens,
    )
    assert unused_special_token(fake) == 9
    del tokens[9]
    with pytest.raises(CheckpointError, match=r"draft\.mask_token_id"):
        unused_special_token(fake)
    fake.mask_token_id = 4
    assert unused_special_token(fake) == 4
