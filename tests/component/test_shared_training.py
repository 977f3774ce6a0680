"""One training by several workers that come and go."""

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.training_tools import CONFIG, packed_config, trainer
from unmask.training.training_state import resume_state, save_state


def ranks(world, config, folder, steps, averages_gradients):
    """Ranks of a data-parallel run as threads: totals are summed as collectives would do it, and gradients averaged
    as a wrapper would, or by the trainers.

    They go on from the newest checkpoint in `folder` and leave one. Losses of draft and confidence head, step by step.
    """
    barrier, shared, reported, norms = threading.Barrier(world), [None] * world, {}, {}

    def gather(rank, tensor):
        shared[rank] = tensor
        barrier.wait(30)
        tensors = list(shared)
        barrier.wait(30)
        return tensors

    def rank_trainer(rank):
        learner = trainer(
            config, rank=rank, world_size=world, reduce=lambda x: torch.stack(gather(rank, x)).sum(0),
            averages_gradients=averages_gradients,
        )  # fmt: skip
        parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]

        def average(*_):
            # Muon calls its hooks for AdamW's part too, when the gradients of matrices are gone.
            for parameter in (p for p in parameters if p.grad is not None):
                parameter.grad = torch.stack(gather(rank, parameter.grad)).mean(0)

        if not averages_gradients:
            learner.optimizer.register_step_pre_hook(average)
        resume_state(folder, learner)
        return learner

    def run(learner):
        for step in steps:
            report = learner.step(step / 40)
            # An optimiser that divides by a gradient's size does not see one of the wrong scale.
            norms[step] = report["grad_norm"]
            reported[step] = [report["loss"], *([report["confidence"]] if config.confidence_weight else [])]

    learners = [rank_trainer(rank) for rank in range(world)]
    with ThreadPoolExecutor(world) as pool:
        for future in [pool.submit(run, learner) for learner in learners]:
            future.result()
    save_state(folder, learners[0], {})
    return [value for step in steps for value in reported[step]], [norms[step] for step in steps]


@pytest.mark.parametrize(
    ("averages_gradients", "optimizer"), [(False, "adamw"), (False, "muon"), (True, "adamw"), (True, "muon")],
    ids=["wrapped", "wrapped, muon", "by themselves", "by themselves, muon"],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("negatives", [10, None], ids=["drawn rows", "a confidence head"])
def test_workers_that_come_and_go_take_the_steps_of_one(negatives, packed, averages_gradients, optimizer, tmp_path):
    """2, then 1, then 2 workers against 1 throughout, with what is drawn at random and what is weighed over rows: the
    default objective in packed rows, the published one with the certainty term in padded ones."""
    rows = {"rows_per_step": 4, "loss": "kl", "weighting": "first_miss"} if packed else {"sequences_per_step": 4}
    config = dataclasses.replace(
        packed_config() if packed else CONFIG, head_negatives=negatives, beta=0.5, certainty_start=0.0,
        confidence_weight=0.5 if negatives is None else 0.0, grad_clip=1e9,
        optimizer=optimizer, **rows,
    )  # fmt: skip
    whole, norms = ranks(1, config, tmp_path / "whole", range(6), averages_gradients)
    parts = [
        ranks(world, config, tmp_path / "parts", range(start, start + 2), averages_gradients)
        for world, start in ((2, 0), (1, 2), (2, 4))
    ]
    losses, norms_of_parts = (list(itertools.chain(*values)) for values in zip(*parts, strict=True))
    assert losses == pytest.approx(whole, rel=1e-6, abs=0)
    if averages_gradients:
        # Wrapped ones are averaged here after they were measured.
        assert norms_of_parts == pytest.approx(norms, rel=1e-5, abs=0)
