"""Where a recipe's processes may run: what its stages ask of a cluster, and whether node types can give it.

Pure arithmetic on counts, so that it serves a file that is checked on a laptop and a cluster that is running.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unmask.config import DistillConfig, Recipe, ServeConfig, TrainingConfig

_TRAINING = frozenset(
    {"num_workers", "min_workers", "cpus_per_worker", "use_gpu", "labels", "threads_per_worker"}
    | {"checkpoint_every_s", "log_every_steps", "max_failures"}
)

PLACING: Mapping[str, frozenset[str]] = {
    "generate": frozenset(
        {"min_actors", "max_actors", "cpus_per_actor", "gpus_per_actor", "labels", "max_attempts", "progress_every_s"}
    ),
    "adapt": _TRAINING,
    "distill": _TRAINING | {"feature_cache_gb", "feature_cache_device"},
    "student": _TRAINING,
    "evaluate": frozenset({"num_workers", "cpus_per_worker", "use_gpu", "labels"}),
    "serve": frozenset(
        {"host", "port", "target_replicas", "max_target_replicas", "draft_replicas", "max_draft_replicas"}
        | {"target_cpus", "target_gpus", "target_labels", "draft_cpus", "draft_gpus", "draft_labels", "ingress_labels"}
        | {"diffusion_replicas", "diffusion_cpus", "diffusion_gpus", "diffusion_labels"}
        | {"scale_up_after_s", "scale_down_after_s", "target_tokens_per_second"}
    ),
}
"""By section: fields that say where a stage runs and how it is watched. No result depends on them, so that a run may go
on with others of them, on another cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Equal processes that run at the same time, each within one node."""

    name: str
    """The fields of the recipe that ask for them, as in `generate` or `serve.target`."""
    resources: Mapping[str, float]
    """Of each process: CPU and GPU counts."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the node must be labelled with."""
    least: int = 1
    """Processes without which the stage does not begin."""
    most: int = 1
    """Processes that it grows to."""

    def __str__(self) -> str:
        return f"{_amounts(self.resources)}{f' on {_labels(self.labels)}' if self.labels else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """Equal nodes: what one holds, and how many there may be."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    most: int = 1

    def room(self, demand: Demand) -> float:
        """Processes of a demand that an empty node of this type has room for; infinite if they take nothing."""
        if any(self.labels.get(name) != value for name, value in demand.labels.items()):
            return 0
        shares = [
            self.resources.get(name, 0) / amount + 1e-9 for name, amount in demand.resources.items() if amount > 0
        ]
        return min(map(math.floor, shares), default=math.inf)


def stage_demands(recipe: Recipe) -> dict[str, list[Demand]]:
    """What each stage asks for while it runs, by the stage's name."""
    generate, evaluate = recipe.generate, recipe.evaluate
    return {
        "adapt": [] if recipe.adapt is None else [_workers("adapt", recipe.adapt)],
        "generate": [
            Demand(
                name="generate",
                resources=_resources(generate.cpus_per_actor, generate.gpus_per_actor),
                labels=generate.labels,
                least=generate.min_actors,
                most=generate.max_actors,
            )
        ],
        "distill": [_workers("student", recipe.student) if recipe.student else _workers("distill", recipe.distill)],
        "evaluate": [
            Demand(
                name="evaluate",
                resources=_resources(evaluate.cpus_per_worker, float(evaluate.use_gpu)),
                labels=evaluate.labels,
                least=evaluate.num_workers,
                most=evaluate.num_workers,
            )
        ],
        "serve": serve_demands(recipe.serve, has_draft=True),
    }


def _workers(name: str, training: DistillConfig | TrainingConfig) -> Demand:
    return Demand(
        name=name,
        resources=_resources(training.cpus_per_worker, float(training.use_gpu)),
        labels=training.labels,
        least=training.min_workers or training.num_workers,
        most=training.num_workers,
    )


def serve_demands(serve: ServeConfig, *, has_draft: bool) -> list[Demand]:
    """What the service asks for: target, ingress and, if there are any, draft and diffusion replicas."""
    target = Demand(
        name="serve.target",
        resources=_resources(serve.target_cpus, serve.target_gpus),
        labels=serve.target_labels,
        least=serve.target_replicas,
        most=serve.max_target_replicas or serve.target_replicas,
    )
    draft = Demand(
        name="serve.draft",
        resources=_resources(serve.draft_cpus, serve.draft_gpus),
        labels=serve.draft_labels,
        least=serve.draft_replicas,
        most=serve.max_draft_replicas or serve.draft_replicas,
    )
    ingress = Demand(name="serve.ingress", resources={}, labels=serve.ingress_labels)
    diffusion = Demand(
        name="serve.diffusion",
        resources=_resources(serve.diffusion_cpus, serve.diffusion_gpus),
        labels=serve.diffusion_labels,
        least=serve.diffusion_replicas,
        most=serve.diffusion_replicas,
    )
    targets = [target, *([draft] if has_draft else [])] if serve.serves_target else []
    return [*targets, *([diffusion] if serve.diffusion is not None else []), ingress]


def plan_line(demand: Demand) -> str:
    """What a plan says of a demand, in one line: how many processes, what each takes, and where."""
    count = str(demand.most) if demand.least == demand.most else f"{demand.least} to {demand.most}"
    return f"# {demand.name}: {count} x ({demand})"


def shortage(demands: Sequence[Demand], nodes: Sequence[NodeType], *, max_nodes: float = math.inf) -> str | None:
    """Why demands cannot be met together, in one line; None if they can be.

    Processes are placed by first fit, those that fewest types have room for first, each type's nodes one after another.

    Args:
        nodes: the types, each with the nodes that it may have at most.
        max_nodes: bound of all types together.
    """
    if problem := misfit(demands, nodes):
        return problem
    free: list[list[dict[str, float]]] = [[] for _ in nodes]
    for demand in sorted(demands, key=lambda d: (sum(n.room(d) > 0 for n in nodes), -sum(d.resources.values()))):
        placed = 0
        while placed < demand.most and _place(demand, nodes, free, max_nodes):
            placed += 1
        if placed < demand.most:
            return (
                f"{demand.name}: up to {demand.most} x {demand} are asked for and {placed} fit; "
                f"raise the nodes of {_fitting(demand, nodes)} or ask for fewer"
            )
    return None


def misfit(demands: Sequence[Demand], nodes: Sequence[NodeType]) -> str | None:
    """Which demand not even an empty node of any type could take, in one line that names what is lacking."""
    for demand in demands:
        if any(node.room(demand) > 0 and node.most > 0 for node in nodes):
            continue
        labelled = [node for node in nodes if not demand.labels.items() - node.labels.items() and node.most > 0]
        if not labelled:
            return f"{demand.name}: no node is labelled {_labels(demand.labels)}"
        lacking = [
            name
            for name, amount in demand.resources.items()
            if any(n.resources.get(name, 0) < amount for n in labelled)
        ]
        offered = "; ".join(f"'{node.name}' {_amounts(node.resources)}" for node in labelled)
        return f"{demand.name}: no node has {demand}: too little {' and '.join(lacking)} ({offered})"
    return None


def _place(demand: Demand, nodes: Sequence[NodeType], free: list[list[dict[str, float]]], max_nodes: float) -> bool:
    """Take a process's resources from the first node with room, opening one if none has; whether there was room."""
    fitting = [index for index, node in enumerate(nodes) if node.room(demand) > 0]
    for index in fitting:
        for left in free[index]:
            if all(left.get(name, 0) + 1e-9 >= amount for name, amount in demand.resources.items()):
                for name, amount in demand.resources.items():
                    left[name] = left.get(name, 0) - amount
                return True
    for index in fitting:
        if len(free[index]) < nodes[index].most and sum(map(len, free)) < max_nodes:
            node = nodes[index].resources
            free[index].append({**node, **{n: node.get(n, 0) - a for n, a in demand.resources.items()}})
            return True
    return False


def _fitting(demand: Demand, nodes: Sequence[NodeType]) -> str:
    return ", ".join(f"'{node.name}' ({node.most})" for node in nodes if node.room(demand) > 0)


def _resources(cpus: float, gpus: float) -> dict[str, float]:
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0}


def _amounts(resources: Mapping[str, float]) -> str:
    known = [f"{resources[name]:g} {name}" for name in sorted(resources) if resources[name]]
    return ", ".join(known) or "no CPU"


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()))
