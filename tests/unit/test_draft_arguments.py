from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engines.draft_arguments import RemoteDraftOptions, with_remote_draft
from unmask.errors import CheckpointError, ConfigError

DRAFT = {"layer_ids": (1, 14, 27), "num_speculative_tokens": 15}


def test_the_v2_runner_is_told_of_a_draft_that_it_never_loads(tmp_path: Path, embedded: Path) -> None:
    options = RemoteDraftOptions(link_file=tmp_path / "link.json", k_by_batch_size=((1, 16, 15), (17, 64, 7)), **DRAFT)
    arguments = with_remote_draft({"model": str(embedded), "max_num_seqs": 64}, options, "v2")
    speculation = arguments["speculative_config"]
    assert (speculation["method"], speculation["num_speculative_tokens"]) == ("dflash", 15)
    assert speculation["num_speculative_tokens_per_batch_size"] == [[1, 16, 15], [17, 64, 7]]
    assert "async_scheduling" not in arguments
    assert arguments["enable_prefix_caching"] is False
    shape = json.loads((Path(speculation["model"]) / "config.json").read_text())
    assert shape["dflash_config"]["target_layer_ids"] == [1, 14, 27]
    assert (shape["architectures"], shape["hidden_size"]) == (["DFlashDraftModel"], 576)
    assert [file.name for file in Path(speculation["model"]).iterdir()] == ["config.json"]


def test_what_contradicts_a_draft_on_a_gpu_is_refused(tmp_path: Path) -> None:
    options = RemoteDraftOptions(link_file=tmp_path / "link.json", **DRAFT)
    with pytest.raises(ConfigError, match="worker_extension_cls"):
        with_remote_draft({"model": str(tmp_path), "worker_extension_cls": "other.Worker"}, options, "v2")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        with_remote_draft({"model": str(tmp_path)}, options, "v2")
    in_turns = replace(options, turns_from=32)
    parallel = ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"distributed_executor_backend": "mp"})
    for arguments in (*parallel, {"async_scheduling": False}):
        with pytest.raises(ConfigError, match=r"serve\.turns_from: needs asynchronous scheduling"):
            with_remote_draft({"model": str(tmp_path)} | arguments, in_turns, "v2")
    with pytest.raises(ConfigError, match=r"serve\.turns_from: must be at most 31"):
        with_remote_draft({"model": str(tmp_path), "max_num_seqs": 31}, in_turns, "v2")
