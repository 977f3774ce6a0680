"""Engine options and versions are checked without importing vLLM."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from engines.engine_options import PLACEMENT, _known_options, check_engine_options, engine_arguments
from engines.versions import TESTED, require_tested_vllm
from unmask.config import TargetConfig
from unmask.errors import ConfigError
from unmask.hardware import is_half


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_sequs": 4}, r"target\.engine\.max_num_sequs: .*did you mean 'max_num_seqs'"),
        ({"trust_remote_code": True}, r"target\.engine\.trust_remote_code: .*never runs code"),
        ({"max_model_len": 4}, r"decided by target\.max_model_len"),
    ],
)
def test_unknown_and_owned_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_engine_options(options)


def test_a_check_does_not_import_vllm() -> None:
    check = "import sys; from engines.engine_options import check_engine_options as check; check({'max_num_seqs': 4})"
    subprocess.run([sys.executable, "-c", f"{check}; assert 'vllm' not in sys.modules"], check=True)


def test_placement_options_exist() -> None:
    assert _known_options() | {"swap_space"} >= PLACEMENT


def test_recipe_wins_over_cpu_defaults() -> None:
    target = TargetConfig(engine={"kv_cache_memory_bytes": 5}, max_model_len=64)
    arguments = engine_arguments(target, Path("/m"), dtype="float32", on_gpu=False)
    assert arguments["kv_cache_memory_bytes"] == 5
    assert arguments["enforce_eager"]
    assert (arguments["model"], arguments["dtype"], arguments["max_model_len"]) == ("/m", "float32", 64)
    assert arguments["load_format"] == "safetensors"
    assert "enforce_eager" not in engine_arguments(target, Path("/m"), dtype="auto", on_gpu=True)


@pytest.mark.parametrize(
    ("runner", "version", "accepted"),
    [
        ("v1", "0.32.0", True),
        ("v1", "0.32.1+cpu", True),
        ("v1", "0.33.0", False),
        ("v2", "0.26.0", True),
        ("v2", "0.32.0", False),
    ],
)
def test_only_tested_versions_run(monkeypatch: pytest.MonkeyPatch, runner: str, version: str, accepted: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if accepted:
        assert str(require_tested_vllm(runner)) == version.split("+")[0]
    else:
        with pytest.raises(ConfigError, match=rf"vLLM {version} .*>={TESTED[runner][0]},<{TESTED[runner][1]}"):
            require_tested_vllm(runner)


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_cpu_without_bfloat16_is_not_asked_for_it(tmp_path: Path, monkeypatch, has_instructions: bool) -> None:
    monkeypatch.setattr("engines.engine_options.multiplies_bfloat16", lambda device: has_instructions)
    found = {
        (dtype, on_gpu): engine_arguments(TargetConfig(), tmp_path, dtype=dtype, on_gpu=on_gpu)["dtype"]
        for dtype in ("auto", "bfloat16")
        for on_gpu in (True, False)
    }
    on_cpu = "auto" if has_instructions else "float32"
    # What a recipe names stays.
    expected = {("auto", True): "auto", ("auto", False): on_cpu}
    assert found == expected | {("bfloat16", on_gpu): "bfloat16" for on_gpu in (True, False)}


def test_training_takes_the_faster_precision_unless_one_is_named(monkeypatch) -> None:
    for has_instructions in (True, False):
        monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda found=has_instructions: found)
        assert is_half(None, "cpu") is has_instructions
        assert is_half(None, "cuda")
        assert is_half("bfloat16", "cpu")
        assert not is_half("float32", "cuda")
