"""What `--plan` says of where stages run: one line for each group of equal processes."""

from __future__ import annotations

from unmask.config import Recipe
from unmask.placement import plan_line, stage_demands


def placement(recipe: Recipe, *stages: str) -> str:
    """Lines of the stages named, in the order of `stage_demands`; of the whole line where none is named.

    A student is not served by it.
    """
    demands = stage_demands(recipe)
    chosen = stages or [name for name in demands if name != "serve" or recipe.student is None]
    lines = [plan_line(demand) for name in demands if name in chosen for demand in demands[name]]
    return "".join(f"{line}\n" for line in lines)
