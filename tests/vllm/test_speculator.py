"""The V2 runner's speculator on a CPU: vLLM's own configuration and batch, the real draft, watchdog and sidecar."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.draft_arguments import (
    LINK_FILE_VARIABLE,
    MAILBOX_FOLDER_VARIABLE,
    WATCHDOG_VARIABLE,
    RemoteDraftOptions,
    with_remote_draft,
)
from tests.pairing_tools import eventually
from tests.vllm.remote_tools import SECRET, write_link
from tests.vllm.vllm_tools import LAYER_IDS, K, make_draft
from unmask.config import EMBEDDED_TARGET
from unmask.errors import ConfigError
from unmask.pairing.client import DraftLink
from unmask.pairing.hello import TargetShape
from unmask.pairing.link_file import read_link_file, write_link_file
from unmask.targets import resolve_target
from unmask.types import ProposalRow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return resolve_target(EMBEDDED_TARGET)


@pytest.fixture(scope="module")
def draft(smollm2, tmp_path_factory) -> Iterator[Path]:
    """The folder of a draft process."""
    path = tmp_path_factory.mktemp("draft")
    make_draft(smollm2, path / "draft")
    (path / "secret").write_bytes(SECRET)
    command = [sys.executable, "-m", "unmask.pairing.server", f"--draft={path / 'draft'}", f"--target={smollm2}"]
    command += [f"--secret-file={path / 'secret'}", f"--address-file={path / 'address'}"]
    command += [f"--mailbox-folder={path / 'boxes'}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
    eventually((path / "address").exists, 180)
    yield path
    process.stdin.close()
    process.wait(20)


@pytest.fixture(scope="module")
def vllm_config(smollm2, tmp_path_factory):
    """What the V2 runner would hand to its speculator."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    folder = tmp_path_factory.mktemp("target")
    write_link(folder, None)
    options = RemoteDraftOptions(link_file=folder / "link.json", layer_ids=LAYER_IDS, num_speculative_tokens=K)
    arguments = with_remote_draft({"model": str(smollm2), "dtype": "float32", "max_num_seqs": 4}, options, "v2")
    # The extension refuses this host's vLLM as it is imported.
    del arguments["worker_extension_cls"]
    config = EngineArgs(**arguments, max_num_batched_tokens=64, max_model_len=128).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder / 'rendezvous'}", 0, "gloo")
        initialize_model_parallel()
        yield config
    cleanup_dist_env_and_memory()


def test_a_version_that_was_not_tested_is_refused_by_name() -> None:
    from engines.runner_hooks import check_interfaces, install
    from engines.speculator import RemoteSpeculator

    with pytest.raises(ConfigError, match=r"V2 runner; install a version >=0\.26\.0,<0\.27"):
        install(RemoteSpeculator)
    with pytest.raises(ConfigError, match=r"vLLM 0\.32: BaseSpeculator\.propose takes"):
        check_interfaces("0.32")


@pytest.mark.parametrize("way", ["same host", "later", pytest.param("sidecar", marks=pytest.mark.slow)])
def test_proposals_are_the_direct_links(draft, vllm_config, monkeypatch, tmp_path, way: str) -> None:
    from engines.speculator import RemoteSpeculator

    link_config = replace(read_link_file(draft / "address"), timeout_ms=30_000)
    write_link_file(tmp_path / "link.json", link_config)
    monkeypatch.setenv(LINK_FILE_VARIABLE, str(tmp_path / "link.json"))
    monkeypatch.setenv(WATCHDOG_VARIABLE, "30000")
    if way != "sidecar":
        monkeypatch.setenv(MAILBOX_FOLDER_VARIABLE, str(draft / "boxes"))
    speculator = RemoteSpeculator(vllm_config, torch.device("cpu"))
    link = DraftLink(tmp_path / "link.json", TargetShape(hidden_size=576, vocab_size=49152, layer_ids=LAYER_IDS), K)
    link.start()
    assert link.wait_until_ready(180)
    eventually(lambda: speculator.target.is_ready, 180)

    # Two requests: one in mid-prompt, one that has verified 3 drafts and accepted 1.
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(11, 576, generator=generator) for _ in LAYER_IDS]
    starts = torch.tensor([0, 7, 11], dtype=torch.int32)
    positions = torch.tensor([*range(7), *range(4)])
    speculator.ks[2] = K - 1
    batch = input_batch(["one", "two"], positions, starts)
    slots = torch.full((4, K), 7)
    speculator.begin(batch.req_ids, slots, way == "later")
    proposed = speculator.propose(
        batch,
        {},
        {},
        states[-1],
        states,
        torch.tensor([0, 2]),
        torch.tensor([0, 2]),
        torch.tensor([[5], [6], [11], [12]]),
        torch.tensor([0, 0, 0, 0]),
        torch.zeros(4),
        torch.zeros(4),
    )
    if way == "later":
        assert not proposed.any()
        # Neither an empty step nor one with more of a prompt waits.
        speculator.begin([], slots, False)
        speculator.begin(["one"], slots, False)
        assert (slots == 7).all()
        speculator.begin(["two"], slots, False)
        assert (slots[:2] == 7).all()
        proposed = slots[2:]
    raw = torch.cat([state[[*range(7), 7, 8]] for state in states], dim=-1)
    rows = [
        ProposalRow(request=1, start=0, num_features=7, last_token=-1),
        ProposalRow(request=2, start=0, num_features=2, last_token=12),
    ]
    _, block = link.propose(rows, raw, [], K - 1)
    # This host compiles nothing, so that an eager embedding will look every id up.
    assert speculator.absent == 0
    assert proposed.tolist() == [[0] * K, [*block, 0]]
    assert (speculator.target.asked, speculator.target.passed) == (1, 0)
    link.close()
    path = speculator.mailbox.path
    assert path.exists()
    speculator.close()
    assert not path.exists()


def input_batch(names: list[str], positions: torch.Tensor, starts: torch.Tensor):
    """vLLM's batch with what a speculator looks at; slots 2, 3, ..."""
    import dataclasses

    from vllm.v1.worker.gpu.input_batch import InputBatch

    given = {
        "req_ids": names,
        "num_reqs": len(names),
        "num_tokens": len(positions),
        "num_scheduled_tokens": np.diff(starts.numpy()),
        "num_computed_tokens_np": positions[starts[:-1].long()].numpy(),
        "prefill_len_np": np.array([8, 1][: len(names)], dtype=np.int32),
        "idx_mapping": torch.arange(2, 2 + len(names), dtype=torch.int32),
        "query_start_loc": starts,
        "positions": positions,
    }
    return InputBatch(**({field.name: None for field in dataclasses.fields(InputBatch)} | given))
