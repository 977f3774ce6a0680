"""Replicas' own counters under the names that the metrics page gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.target_stats import TargetStats
    from serve_app.diffusion_engine import EngineStats
    from unmask.capture import Capture
    from unmask.pairing.server import DraftStats


def target_metrics(stats: TargetStats, link: dict[str, float] | None) -> dict[str, Any]:
    """A target replica's: vLLM's names for what vLLM counts, ours for the link to the draft.

    Args:
        stats: the engine's counters.
        link: fields of `unmask.pairing.status`; None without a draft.
    """
    metrics: dict[str, Any] = {
        "vllm:spec_decode_num_drafts_total": stats.num_drafts,
        "vllm:spec_decode_num_draft_tokens_total": stats.num_draft_tokens,
        "vllm:spec_decode_num_accepted_tokens_total": stats.num_accepted_tokens,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total": list(stats.num_accepted_tokens_per_pos),
        "vllm:generation_tokens_total": stats.num_generated_tokens,
        "vllm:prompt_tokens_total": stats.num_prompt_tokens,
        "vllm:num_preemptions_total": stats.num_preemptions,
        "vllm:num_requests_running": stats.num_running,
        "vllm:num_requests_waiting": stats.num_waiting,
        "vllm:kv_cache_usage_perc": stats.kv_cache_usage,
        "unmask_speculation_enabled": link["speculation_enabled"] if link else 0,
    }
    if stats.acceptance_length is not None:
        metrics["unmask_acceptance_length"] = stats.acceptance_length
    if link:
        metrics |= {
            "unmask_link_connected": link["connected"],
            "unmask_link_drafts_connected": link["drafts_connected"],
            "unmask_link_breaker_open": link["breaker_open"],
            "unmask_link_draft_version": link["draft_version"],
            "unmask_link_num_speculative_tokens": link["num_speculative_tokens"],
            "unmask_link_steps_total": link["steps"],
            "unmask_link_proposals_total": link["proposals"],
            "unmask_link_proposed_tokens_total": link["proposed_tokens"],
            "unmask_link_failures_total": link["failures"],
            "unmask_link_connect_failures_total": link["connect_failures"],
            "unmask_link_round_trip_seconds_total": link["round_trip_ms_sum"] / 1e3,
            "unmask_link_round_trips_total": link["round_trip_ms_count"],
            "unmask_link_sent_bytes_total": link["bytes_sent"],
            "unmask_link_received_bytes_total": link["bytes_received"],
        }
    return metrics


def capture_metrics(capture: Capture | None) -> dict[str, Any]:
    """A target replica's capture of requests; nothing where none was asked for."""
    if capture is None:
        return {}
    return {
        "unmask_captured_requests_total": capture.stats.written,
        "unmask_capture_dropped_total": capture.stats.dropped,
        "unmask_capture_failures_total": capture.stats.failed,
        "unmask_capture_bytes": capture.stats.size,
    }


def diffusion_metrics(stats: EngineStats) -> dict[str, Any]:
    """A diffusion LM's replica's."""
    metrics: dict[str, Any] = {
        "unmask_denoise_steps_total": stats.num_steps,
        "unmask_denoise_forwards_total": stats.num_batches,
        "unmask_diffusion_tokens_total": stats.num_tokens,
        "unmask_diffusion_finished_total": stats.num_finished,
        "unmask_diffusion_aborted_total": stats.num_aborted,
        "unmask_diffusion_requests_running": stats.num_running,
        "unmask_diffusion_requests_waiting": stats.num_waiting,
    }
    if stats.finished_forwards:
        metrics["unmask_tokens_per_forward"] = stats.finished_tokens / stats.finished_forwards
    return metrics


def draft_metrics(stats: DraftStats) -> dict[str, Any]:
    """A draft replica's."""
    return {
        "unmask_draft_version": stats.draft_version % 2**53,  # what a float64 holds exactly, as the link reports it
        "unmask_draft_swaps_total": stats.swaps,
        "unmask_draft_connections": stats.connections,
        "unmask_draft_refused_total": stats.refused,
        "unmask_draft_steps_total": stats.steps,
        "unmask_draft_messages_total": stats.messages,
        "unmask_draft_proposals_total": stats.proposals,
        "unmask_draft_proposed_tokens_total": stats.proposed_tokens,
        "unmask_draft_proposals_with_gap_total": stats.proposals_with_gap,
        "unmask_draft_busy_seconds_total": stats.busy_s,
        "unmask_draft_resident_requests": stats.resident_requests,
        "unmask_draft_resident_pages": stats.resident_pages,
        "unmask_draft_idle_pages": stats.idle_pages,
        "unmask_draft_pages": stats.num_pages,
    }
