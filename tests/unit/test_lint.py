"""`unmask lint`: every file that the project ships is good, and each way to break one is a line that names it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from engines.versions import TESTED
from pipelines.lint.__main__ import main
from pipelines.lint.kubernetes import amount
from tests.lint_tools import ROOT

MONITORING = (ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana")
"""Files of other programs, which have tests of their own."""
SHIPPED = [
    ROOT / "cluster.yaml",
    *(
        path
        for folder in ("recipes", "deploy", "serve_app")
        for path in sorted((ROOT / folder).rglob("*.y*ml"))
        if not path.is_relative_to(MONITORING[0]) and not path.is_relative_to(MONITORING[1])
    ),
]


def test_every_file_of_the_project_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(SHIPPED) >= 9
    assert main([str(path) for path in SHIPPED]) == 0
    output = capsys.readouterr()
    assert not output.err
    assert len(output.out.splitlines()) == len(SHIPPED)


def test_the_image_installs_versions_that_the_project_allows() -> None:
    lines = (ROOT / "requirements" / "gpu.txt").read_text().splitlines()
    pins = {pin.name: pin for line in lines if not line.startswith("#") for pin in [Requirement(line)]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["gpu"])]
    assert pins.keys() == {requirement.name for requirement in wanted}
    for requirement in wanted:
        [specifier] = pins[requirement.name].specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version)
    assert str(pins["vllm"].specifier) == f"=={TESTED['v2'][0]}"
    assert "--constraint requirements/gpu.txt" in (ROOT / "deploy" / "Dockerfile").read_text()


POLICY = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: x}\nspec: {podSelector: {}, "
BUDGET = "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: x}\nspec: {selector: {}"
SERVED = "import_path: 'serve_app.app:build', args: {dtype: float32}"


def admitting(peer: str) -> str:
    """A policy that admits somebody."""
    return f"{POLICY}policyTypes: [Ingress], ingress: [{{from: [{peer}], ports: [{{port: 1}}]}}]}}"


def overriding(option: str) -> str:
    """A Serve config that replaces an option of a deployment."""
    return f"applications: [{{name: a, {SERVED}, deployments: [{{name: Target, {option}}}]}}]"


REFUSED_TEXTS = [
    ("", "is empty"),
    ("- 1", "must be a mapping"),
    ("a: [", "is not valid YAML"),
    ("generate: {max_actors: 2}\ngenerate: {max_actors: 3}", "is not valid YAML: 'generate' is given twice"),
    ("generate: {max_actors: 2, max_actors: 3}", "'max_actors' is given twice"),
    ("colour: red", "is neither a recipe"),
    ("generate: {max_actor: 2}", "generate.max_actor: unknown key (did you mean 'max_actors'?)"),
    (BUDGET + "}", "either min"),
    (BUDGET + ", maxUnavailable: 1}", "minAvailable must be a count"),
    (BUDGET + ", minAvailable: -1}", "spec.minAvailable"),
    (BUDGET + ", maxUnavailable: -1}", "spec.maxUnavailable"),
    (POLICY + "policyTypes: [Ingress], ingress: [{ports: [{port: 1}]}]}", "spec.ingress.0.from: Field required"),
    (admitting("{}"), "an empty peer names nobody"),
    (admitting("{namespaceSelector: {}}"), "admits every namespace"),
    (admitting("{namespaceSelector: {matchLabels: {}}}"), "admits every namespace"),
    (admitting("{ipBlock: {cidr: 0.0.0.0/0}}"), "from.0.ipBlock: 0.0.0.0/0 is everybody"),
    (admitting("{ipBlock: {cidr: '::/0'}}"), "::/0 is everybody"),
    (admitting("{ipBlock: {cidr: 10.0.0.0/40}}"), "does not appear to be an IPv4 or IPv6 network"),
    (POLICY + "policyTypes: [Ingress], egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0}}]}]}", "is everybody"),
    (
        POLICY + "policyTypes: [Egress], ingress: [{from: [{podSelector: {}}]}]}",
        "has ingress rules, which do nothing: add Ingress to policyTypes",
    ),
    (
        POLICY + "policyTypes: [Ingress], egress: [{to: [{podSelector: {}}]}]}",
        "has egress rules, which do nothing: add Egress to policyTypes",
    ),
    (
        overriding("autoscaling_config: {max_replicas: 50}"),
        "applications.a.deployments.Target.autoscaling_config: replaces what the application's args say",
    ),
    (overriding("ray_actor_options: {num_gpus: 4}"), "deployments.Target.ray_actor_options: replaces"),
    (overriding("num_replicas: 9"), "deployments.Target.num_replicas: replaces"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED_TEXTS)
def test_other_mistakes_end_with_2_and_a_line(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert main([str(path), str(ROOT / "recipes" / "demo.yaml")]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert message in output.err
    assert output.err.startswith(f"error: {path}: ")
    assert "demo.yaml: recipe" in output.out


@pytest.mark.parametrize(
    "text",
    [
        "evaluate: {labels: &labels {role: train, zone: a}}\ngenerate: {labels: {<<: *labels, role: generate}}",
        overriding("health_check_period_s: 5"),
        BUDGET + ", minAvailable: 0}",
        admitting("{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}"),
    ],
)
def test_what_looks_like_a_mistake_and_is_none_passes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert main([str(path)]) == 0


def test_a_recipe_beside_a_cluster_is_checked_against_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("generate: {gpus_per_actor: 2, labels: {role: generate}}")
    assert main([str(ROOT / "cluster.yaml"), str(recipe)]) == 2
    assert "generate: no node has 1 CPU, 2 GPU on role=generate: too little GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantity", "number"),
    [("2", 2), ("500m", 0.5), ("1.5", 1.5), ("4Ki", 4096), ("2G", 2e9), ("3k", 3000), ("1E", 1e18), ("2e3", 2000)],
)
def test_quantities(quantity: str, number: float) -> None:
    assert amount(quantity) == number
