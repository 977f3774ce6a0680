"""Room for a recipe's processes: shapes, labels, counts, and what is said where something is lacking."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from pipelines.placement import placement
from unmask.config import ServeConfig
from unmask.placement import Demand, NodeType, misfit, plan_line, serve_demands, shortage, stage_demands
from unmask.recipe import load_recipe, parse, parse_recipe

GPU = Demand(name="serve.target", resources={"CPU": 4, "GPU": 1}, labels={"role": "target"}, least=1, most=4)
TARGET = NodeType(name="target", resources={"CPU": 16, "GPU": 2}, labels={"role": "target"}, most=2)


def test_a_recipe_names_what_its_stages_ask_for() -> None:
    tree = {
        "generate": {"min_actors": 2, "max_actors": 8, "gpus_per_actor": 1, "labels": {"role": "generate"}},
        "distill": {"num_workers": 3, "min_workers": 2, "sequences_per_step": 3, "use_gpu": True},
        "serve": {"target_gpus": 0.5, "max_target_replicas": 4, "ingress_labels": {"role": "head"}},
    }
    demands = stage_demands(parse_recipe(tree))
    generate, distill = demands["generate"][0], demands["distill"][0]
    assert (generate.resources, generate.labels) == ({"CPU": 1, "GPU": 1}, {"role": "generate"})
    assert (generate.least, generate.most) == (2, 8)
    assert (distill.resources, distill.least, distill.most) == ({"CPU": 1, "GPU": 1}, 2, 3)
    target, draft, ingress = demands["serve"]
    assert (target.resources, target.least, target.most) == ({"CPU": 1, "GPU": 0.5}, 1, 4)
    assert (draft.resources, draft.most) == ({"CPU": 1}, 1)
    assert (ingress.resources, ingress.labels) == ({}, {"role": "head"})


def test_a_service_asks_for_the_models_that_it_has() -> None:
    def names(has_draft: bool = False, **fields: object) -> list[str]:
        serve = parse(ServeConfig, {"diffusion_gpus": 1, "diffusion_labels": {"role": "d"}, **fields})
        return [demand.name.removeprefix("serve.") for demand in serve_demands(serve, has_draft=has_draft)]

    assert names() == ["target", "ingress"]
    assert names(has_draft=True) == ["target", "draft", "ingress"]
    assert names(diffusion="/d") == ["diffusion", "ingress"]
    assert names(diffusion="/d", diffusion_name="d") == ["target", "diffusion", "ingress"]


def test_a_plan_says_where_every_process_of_the_stages_runs() -> None:
    recipe = load_recipe("recipes/qwen3_8b_cluster.yaml")
    assert placement(recipe, "evaluate") == "# evaluate: 8 x (8 CPU, 1 GPU on role=train)\n"
    lines = placement(recipe).splitlines()
    every = [demand for demands in stage_demands(recipe).values() for demand in demands]
    assert lines == [plan_line(demand) for demand in every]
    assert "# generate: 1 to 16 x (8 CPU, 1 GPU on role=generate)" in lines
    assert any(line.startswith("# serve.draft: ") for line in lines)


def test_the_demo_fits_a_laptop() -> None:
    laptop = [NodeType(name="laptop", resources={"CPU": 4})]
    for demands in stage_demands(load_recipe("recipes/demo.yaml")).values():
        assert shortage(demands, laptop) is None


def test_what_fits_and_what_does_not() -> None:
    assert shortage([GPU], [TARGET]) is None
    assert shortage([replace(GPU, most=5)], [TARGET]) == (
        "serve.target: up to 5 x 4 CPU, 1 GPU on role=target are asked for and 4 fit; "
        "raise the nodes of 'target' (2) or ask for fewer"
    )
    assert shortage([GPU], [TARGET], max_nodes=1) is not None
    assert shortage([replace(GPU, resources={"GPU": 0.5}, most=8)], [TARGET]) is None
    # Demands that share nodes are counted together.
    other = replace(GPU, name="serve.draft", most=1)
    assert shortage([GPU, other], [TARGET]) is not None
    assert shortage([replace(GPU, most=3), other], [TARGET]) is None


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        (replace(GPU, labels={"role": "draft"}), "serve.target: no node is labelled role=draft"),
        (
            replace(GPU, resources={"CPU": 4, "GPU": 3}),
            "serve.target: no node has 4 CPU, 3 GPU on role=target: too little GPU ('target' 16 CPU, 2 GPU)",
        ),
        (
            replace(GPU, resources={"TPU": 1}, labels={}),
            "serve.target: no node has 1 TPU: too little TPU ('target' 16 CPU, 2 GPU)",
        ),
    ],
)
def test_what_no_node_can_take_is_named(demand: Demand, message: str) -> None:
    assert misfit([demand], [TARGET]) == message
    assert shortage([demand], [TARGET]) == message


def test_a_type_without_nodes_offers_nothing() -> None:
    assert misfit([GPU], [replace(TARGET, most=0)]) is not None
    assert misfit([Demand(name="serve.ingress", resources={})], [TARGET]) is None


def test_first_fit_never_claims_room_that_is_not_there() -> None:
    """Against trying every assignment of processes to nodes."""
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        nodes = [
            NodeType(name=str(i), resources={"CPU": generator.randint(1, 4), "GPU": generator.randint(0, 2)})
            for i in range(generator.randint(1, 3))
        ]
        demands = [
            Demand(name=str(i), resources={"CPU": generator.randint(1, 3), "GPU": generator.randint(0, 1)}, most=most)
            for i, most in enumerate((generator.randint(1, 2), generator.randint(1, 2)))
        ]
        fits = _some_assignment_fits(demands, nodes)
        if shortage(demands, nodes) is None:
            assert fits
        refused += not fits
    assert refused > 20


def _some_assignment_fits(demands: list[Demand], nodes: list[NodeType]) -> bool:
    processes = [demand.resources for demand in demands for _ in range(demand.most)]
    for where in itertools.product(range(len(nodes)), repeat=len(processes)):
        used = [{"CPU": 0.0, "GPU": 0.0} for _ in nodes]
        for node, resources in zip(where, processes, strict=True):
            for name, amount in resources.items():
                used[node][name] += amount
        if all(used[i][name] <= node.resources[name] for i, node in enumerate(nodes) for name in ("CPU", "GPU")):
            return True
    return False
