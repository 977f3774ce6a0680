"""A remote draft for vLLM's V2 model runner: a speculator that owns no weights and never makes the CPU wait.

The engine is configured for vLLM's `dflash` method, so that the runner reports hidden states; `init_speculator` is
replaced where the runner looks it up. A step's rows leave through a mailbox in shared memory and its proposals come
back through it, both in the order of the CUDA stream: asynchronous scheduling and CUDA graphs stay as they are.
`engines.worker_extension` brings this into every worker.
"""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from vllm.config import CompilationMode, SpeculativeConfig, VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from engines.draft_arguments import (
    EIGHT_BIT_VARIABLE,
    LINK_FILE_VARIABLE,
    MAILBOX_FOLDER_VARIABLE,
    WATCHDOG_VARIABLE,
)
from engines.load_watch import LoadWatch
from engines.prompt_hashes import PromptHashes
from engines.runner_hooks import schedulers
from engines.step_times import NO_TIMES, StepTimes
from engines.turns import Owed, turns
from unmask.errors import ConfigError
from unmask.files import private_folder
from unmask.pairing.attendants import Attendants
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_folder import new_path
from unmask.pairing.mailbox_layout import Layout
from unmask.pairing.mailbox_target import MailboxTarget
from unmask.pairing.packed_rows import StepTensors
from unmask.pairing.sidecar import target_shape
from unmask.pairing.stream_words import HostWords, PinnedMailbox, StreamWords
from unmask.pairing.wire import EIGHT_BIT

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - what it holds is private to this user
_DEFAULT_WATCHDOG_MS = "100"


class RemoteSpeculator(BaseSpeculator):
    """Proposes what a draft in another process drafts; -1 where there is none.

    Only the first tensor-parallel rank speaks to the draft; the others are told the tokens.

    Args:
        vllm_config, device: see vLLM.
        folder: that a draft on this host serves; None is what the environment names, "" the link file's drafts.

    Raises:
        ConfigError: no draft is named, or the engine's options do not suit a remote draft.
    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device, folder: str | None = None) -> None:
        config = cast(SpeculativeConfig, vllm_config.speculative_config)
        self.model = torch.nn.Module()
        self.device = device
        self.max_k: int = config.num_speculative_tokens
        max_requests = vllm_config.scheduler_config.max_num_seqs
        self.ks = [self.max_k] * (max_requests + 1)
        if config.num_speculative_tokens_per_batch_size:
            self.ks = build_dynamic_sd_schedule_lookup(
                config.num_speculative_tokens_per_batch_size, max_requests, self.max_k
            )
        self.watch = LoadWatch(self.ks[1:], self.ks, device) if len(set(self.ks[1:])) > 1 else None
        """Chooses K by load; None keeps the table."""
        self.times: StepTimes | None = None
        self._prompts = PromptHashes() if vllm_config.cache_config.enable_prefix_caching else None
        # Compiled embeddings and the rejection sampler take -1 for no draft; an eager embedding looks every id up.
        compilation = vllm_config.compilation_config
        is_compiled = compilation.mode == CompilationMode.VLLM_COMPILE and compilation.backend != "eager"
        self.absent = -1 if is_compiled else 0
        self.dtype = cast(torch.dtype, vllm_config.model_config.dtype)
        layers = get_eagle3_aux_layers_from_config(config)
        if not layers:
            raise ConfigError("the draft's config.json names no target_layer_ids", field="speculative_config.model")
        self.width: int = vllm_config.model_config.get_hidden_size()
        self.num_layers = len(layers)
        self.target: MailboxTarget | None = None
        self._draft_tokens: Tensor | None = None
        self._owed: Owed | None = None
        self._comes_later = self._is_warm = False
        if get_tp_group().rank_in_group == 0:
            folder = os.environ.get(MAILBOX_FOLDER_VARIABLE) if folder is None else folder
            self._open(vllm_config, [layer - 1 for layer in layers], folder)

    def _open(self, vllm_config: VllmConfig, layer_ids: Sequence[int], folder: str | None) -> None:
        """Make the mailbox, and start whoever attends to it."""
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        link_file = os.environ.get(LINK_FILE_VARIABLE)
        if not link_file and not folder:
            raise ConfigError("set it to the path of the draft's link file", field=LINK_FILE_VARIABLE)
        layout = Layout(
            max_requests=scheduler.max_num_seqs,
            max_rows=scheduler.max_num_batched_tokens,
            width=self.width,
            dtype=EIGHT_BIT if os.environ.get(EIGHT_BIT_VARIABLE) == "1" else cast(torch.dtype, model.dtype),
            max_k=self.max_k,
        )
        place = private_folder(Path(folder) if folder else _SHARED_MEMORY / f"unmask-{os.getuid()}")
        self.mailbox = Mailbox.create(new_path(place), layout)
        path, vocab_size = str(self.mailbox.path), model.get_vocab_size()
        limit = os.environ.get(WATCHDOG_VARIABLE, _DEFAULT_WATCHDOG_MS)
        attendants = [["unmask.pairing.watchdog", path, f"--limit-ms={limit}"]]
        # Beside a folder it says no more than which target this is, and need not be there.
        names_target = bool(link_file) and (not folder or Path(str(link_file)).exists())
        shape = target_shape(self.width, vocab_size, layer_ids, link_file if names_target else None)
        if not folder:
            sizes = [f"--vocab-size={vocab_size}", "--layer-ids", *map(str, layer_ids)]
            attendants.append(["unmask.pairing.sidecar", f"--mailbox={path}", f"--link-file={link_file}", *sizes])
        words = PinnedMailbox(self.mailbox) if self.device.type == "cuda" else HostWords(self.mailbox)
        self.target = MailboxTarget(self.mailbox, words, shape, self.device, self.absent)
        self.attendants = Attendants(attendants)
        self.attendants.start()
        if self.device.type == "cpu":
            # On a GPU with the first step: a draft's projection is copied to the device on a thread of its own, which
            # would spoil the graphs that vLLM captures until then.
            self.target.start()
        # vLLM drops its speculator without a word. What a killed worker leaves behind the next one clears away.
        self.close = weakref.finalize(self, _close, self.target, words, self.attendants, self.mailbox)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing is captured here: the waits are not part of any graph."""

    def capture(self) -> None:
        """See `init_cudagraph_manager`."""

    @torch.inference_mode()
    def propose(  # pyrefly: ignore[bad-override] - the tested version's, see `check_interfaces`
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, Tensor],
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        num_tokens_across_dp: Tensor | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[Tensor], Tensor] | None = None,
        is_profile: bool = False,
    ) -> Tensor:
        """Proposals int64 [R, K] on the device, not waited for."""
        num_requests, num_tokens = input_batch.num_reqs, input_batch.num_tokens
        sampled = StepTensors(
            positions=input_batch.positions[:num_tokens],
            query_starts=input_batch.query_start_loc,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            slots=input_batch.idx_mapping,
            last_sampled=last_sampled,
        )
        if dummy_run or is_profile:
            self._prepare(sampled)
            return torch.zeros(num_requests, self.max_k, dtype=torch.int64, device=self.device)
        times = self.times or NO_TIMES
        times.begin(num_requests)
        self._collect()
        times("collected")
        tokens = torch.full((num_requests, self.max_k), self.absent, dtype=torch.int64, device=self.device)
        if self.target is not None:
            self.target.start()
        hashes = self._prompts.of(input_batch.req_ids, input_batch.num_scheduled_tokens) if self._prompts else ()
        if self.target is not None and aux_hidden_states is not None:
            turns.has_draft = self.target.is_ready
            watch = self.watch
            if watch is not None and (self._comes_later or not self.target.is_ready):
                watch.skip()
                watch = None
            if watch is not None:
                self._follow_load(watch)
                watch.begin(input_batch.num_scheduled_tokens, self.ks[num_requests], num_sampled)
            drafting, coming = _drafting(input_batch), _coming(input_batch)
            tokens = self.target.propose(
                input_batch.req_ids,
                aux_hidden_states,
                sampled,
                coming=coming,
                k=self.ks[num_requests],
                hashes=hashes,
                wanted=bool(drafting.any()),
                comes_later=self._comes_later,
                mark=times,
            )
            if self.target.is_owing:
                # Those in the midst of their prompts may be in the next step, and have none to come.
                names = itertools.compress(input_batch.req_ids, drafting)
                self._owed = Owed(frozenset(names), input_batch.idx_mapping.clone())
            times("end")
            if watch is not None:
                watch.answered()
        group = get_tp_group()
        return tokens if group.world_size == 1 else group.broadcast(tokens, src=0)

    def set_ks(self, ks: Sequence[int]) -> None:
        """K for each batch size 0 .. max_num_seqs, for the draft and, where it runs in this process, the scheduler."""
        self.ks = list(ks)
        for scheduler in schedulers:
            if scheduler.dynamic_sd_lookup is not None:
                scheduler.dynamic_sd_lookup = list(ks)

    def _follow_load(self, watch: LoadWatch) -> None:
        # Where the scheduler is in another process it would not hear of it.
        table = watch.poll() if schedulers else None
        if table is not None:
            logger.info("K by batch size is now %s", _spans(table))
            self.set_ks(table)

    @torch.inference_mode()
    def begin(self, names: Collection[str], draft_tokens: Tensor, comes_later: bool) -> None:
        """A step begins.

        Args:
            names: of its requests.
            draft_tokens: int64 [slots, K], where the runner keeps what is to be verified.
            comes_later: whether none of them is in the next step (see `engines.turns`).
        """
        self._draft_tokens, self._comes_later = draft_tokens, comes_later
        if self._owed is not None and not self._owed.names.isdisjoint(names):
            # No step has come between.
            self._collect()

    def _collect(self) -> None:
        """Queue what brings owed proposals to their slots. A request that has left its slot since is done no harm: its
        successor's are stored after it has been drafted for."""
        owed, self._owed = self._owed, None
        if owed is not None and self.target is not None and self._draft_tokens is not None:
            self._draft_tokens[owed.slots] = self.target.collect()

    def introduce(self, name: str, tokens: Sequence[int], num_computed: int) -> None:
        """A request begins, or begins again (see `PromptHashes.introduce`)."""
        if self._prompts is not None:
            self._prompts.introduce(name, tokens, num_computed)

    def finish(self, names: Iterable[str]) -> None:
        """Requests that have ended."""
        ended = list(names)
        if self._prompts is not None:
            self._prompts.forget(ended)
        if self.target is not None:
            self.target.finish(ended)

    def _prepare(self, sampled: StepTensors) -> None:
        """Take the memory that the projection will need, so that vLLM's profile leaves room for it; compile, once."""
        options, num_tokens = {"dtype": self.dtype, "device": self.device}, len(sampled.positions)
        wide = self.num_layers * self.width
        shapes = ((self.width, wide), (num_tokens, wide), (num_tokens, 2 * self.width))
        held = [torch.empty(shape, **options) for shape in shapes]
        del held
        if self.target is not None and num_tokens and not self._is_warm:
            self.target.warm_up(sampled)
            self._is_warm = True


def _drafting(batch: InputBatch) -> np.ndarray:
    """Which requests have their next token sampled in this step: bool [R]."""
    return batch.num_computed_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np


def _coming(batch: InputBatch) -> ComingRows:
    """Where a prompt's rows begin is known; how many drafts of the step before were kept is not."""
    is_prompt = batch.num_computed_tokens_np < batch.prefill_len_np
    starts = np.where(is_prompt, batch.num_computed_tokens_np, -1)
    return ComingRows(batch.num_scheduled_tokens.astype(np.int64), starts.astype(np.int64))


def _spans(table: Sequence[int]) -> str:
    """As in 1-16: 15, 17-64: 7."""
    groups = [list(group) for _, group in itertools.groupby(range(1, len(table)), key=lambda n: table[n])]
    return ", ".join(f"{group[0]}-{group[-1]}: {table[group[0]]}" for group in groups)


def _close(target: MailboxTarget, words: StreamWords, attendants: Attendants, mailbox: Mailbox) -> None:
    try:
        target.close()
        if isinstance(words, PinnedMailbox):
            # The watchdog goes last, so that this comes to an end; pages must not be unmapped while they are pinned.
            torch.cuda.synchronize()
            words.close()
    finally:
        attendants.close()
        mailbox.remove()
