"""Evaluation on a worker: one process with target, draft and n-gram table, given a share of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unmask.checkpoints import load_confidence, load_draft
from unmask.config import Recipe
from unmask.decoding.ngram import NgramProposer
from unmask.evaluation.diagnosis import accepted_with_shift
from unmask.evaluation.pairing import PairingEvaluator
from unmask.models.target import TargetModel
from unmask.pairing.block_drafter import head_for
from unmask.targets import eos_ids
from unmask.trajectories import read_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatorSpec:
    """What a worker is told."""

    target_path: str
    draft_path: str
    run_dir: str
    num_speculative_tokens: int
    max_new_tokens: int
    threads: int


class Evaluator:
    """Evaluates prompts one after another."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        torch.set_num_threads(spec.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        draft = load_draft(spec.draft_path).to(device)
        target = TargetModel.load(spec.target_path, draft.config.target_layer_ids, torch.float32).to(device)
        # As served: one that was trained on sampled text says nothing of what is decoded here.
        confidence = head_for(draft.config, load_confidence(spec.draft_path))
        tables = read_tables(Path(spec.run_dir), ["response_ids"])
        self.evaluator = PairingEvaluator(
            target,
            draft,
            num_speculative_tokens=spec.num_speculative_tokens,
            max_new_tokens=spec.max_new_tokens,
            eos_ids=eos_ids(spec.target_path),
            ngrams=NgramProposer(ids for table in tables for ids in table["response_ids"].to_pylist()),
            confidence=confidence.to(device) if confidence is not None else None,
        )

    def run(self, prompt_ids: list[int]) -> dict[str, Any]:
        """The `PromptOutcome` of one prompt as plain values."""
        return asdict(self.evaluator.run(prompt_ids))


def accepted_by_shift(
    recipe: Recipe, path: Path, draft_path: Path, prompts: Sequence[Sequence[int]]
) -> dict[int, list[list[int]]]:
    """What the plain loop accepts when its features come from the draft's own layers (0), and from those beside them.

    Accepted drafts of each verification, by shift and prompt: see `unmask.evaluation.diagnosis.accepted_with_shift`.
    """
    torch.set_num_threads(max(1, int(recipe.evaluate.cpus_per_worker)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draft = load_draft(draft_path).to(device)
    layers = draft.config.target_layer_ids
    target = TargetModel.load(path, layers, torch.float32).to(device)
    return {
        shift: accepted_with_shift(
            target,
            draft,
            prompts,
            shift,
            num_speculative_tokens=recipe.evaluate.num_speculative_tokens or draft.config.block_size - 1,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            eos_ids=eos_ids(path),
        )
        for shift in (0, 1, -1)
        if min(layers) + shift >= 0 and max(layers) + shift < len(target.blocks)
    }
