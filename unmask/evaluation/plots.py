"""Plots of a pairing's evaluation, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.evaluation.pairing import SetSummary


def plot_pairing(sets: Mapping[str, SetSummary], log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Acceptance by position, acceptance length beside n-grams, and the training loss, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The object interface: pyplot would keep global state and look for a display.
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    positions, lengths, losses = figure.subplots(1, 3)
    for name, summary in sets.items():
        rates = summary.acceptance_by_position
        positions.plot(range(1, len(rates) + 1), rates, marker="o", label=name)
    positions.set(title="Accepted, by position in the block", xlabel="drafted position", ylabel="share", ylim=(0, 1))
    positions.legend()
    _length_bars(lengths, sets)
    if log:
        losses.plot([r["step"] for r in log], [r["loss"] for r in log])
        losses.plot([r["step"] for r in log], [r["accuracy"] for r in log], linestyle="--")
        losses.set(title="Training: loss, accuracy (dashed)", xlabel="step")
    figure.savefig(path, dpi=120)


def _length_bars(axes: Any, sets: Mapping[str, SetSummary]) -> None:
    width = 0.38
    for index, summary in enumerate(sets.values()):
        low, high = summary.interval95
        tau = summary.acceptance_length
        error = [[max(tau - low, 0)], [max(high - tau, 0)]]
        axes.bar(index - width / 2, tau, width, yerr=error, capsize=4, color="C0", label=None if index else "draft")
        axes.bar(
            index + width / 2, summary.acceptance_length_ngram, width, color="C7", label=None if index else "n-grams"
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(title="Acceptance length (95 % interval over prompts)", ylabel="tokens per verification")
    axes.set_xticks(range(len(sets)), list(sets))
    axes.legend()
