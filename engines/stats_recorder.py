"""Adds what vLLM's engine core reports of each step to a `TargetStats`."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from engines.target_stats import TargetStats


class StatsRecorder(StatLoggerBase):
    """A vLLM stat logger that adds every step to a `TargetStats`."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int, stats: TargetStats) -> None:
        self._stats = stats
        stats.num_accepted_tokens_per_pos = [0] * vllm_config.num_speculative_tokens

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Add one step."""
        stats = self._stats
        stats.num_steps += 1
        if iteration_stats is not None:
            stats.num_generated_tokens += iteration_stats.num_generation_tokens
            stats.num_prompt_tokens += iteration_stats.num_prompt_tokens
            stats.num_preemptions += iteration_stats.num_preempted_reqs
        if scheduler_stats is None:
            return
        stats.num_running = scheduler_stats.num_running_reqs
        stats.num_waiting = scheduler_stats.num_waiting_reqs
        stats.kv_cache_usage = scheduler_stats.kv_cache_usage
        drafted = scheduler_stats.spec_decoding_stats
        if drafted is not None:
            stats.num_drafts += drafted.num_drafts
            stats.num_draft_tokens += drafted.num_draft_tokens
            stats.num_accepted_tokens += drafted.num_accepted_tokens
            for position, accepted in enumerate(drafted.num_accepted_tokens_per_pos):
                stats.num_accepted_tokens_per_pos[position] += accepted

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
