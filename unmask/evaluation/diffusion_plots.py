"""Plots of diffusion decoders, as PNG files: accuracy over parallelism, and the order of commitments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def plot_speed_accuracy(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Accuracy (percent) over tokens per forward, one line a system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        ordered = sorted(points)
        # Ten colours come round again, markers do not.
        marker = "osD^vPX*"[number // 10 % 8]
        axes.plot([tpf for tpf, _ in ordered], [accuracy for _, accuracy in ordered], marker=marker, label=name)
    axes.set(title="Accuracy under parallelism", xlabel="tokens per forward", ylabel="accuracy, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")  # inside it would hide points
    figure.savefig(path, dpi=120)


def plot_commit_order(heats: Mapping[str, np.ndarray], path: Path) -> None:
    """Which column is committed at which forward: `evaluation.diffusion.commit_order` of each system, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(heats), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, heat) in zip(figure.subplots(1, len(heats), squeeze=False)[0], heats.items(), strict=True):
        axes.imshow(np.sqrt(heat), aspect="auto", origin="lower", cmap="magma", interpolation="nearest")
        axes.set(title=name, xlabel="response column", ylabel="forward")
    figure.savefig(path, dpi=120)
