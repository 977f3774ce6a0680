"""`unmask lint`: every file that the project ships is good, and each way to break one is a line that names it."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from engines.versions import TESTED
from pipelines.lint.__main__ import check, main, read
from pipelines.lint.kubernetes import amount
from unmask.errors import UserError

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/gcp.yaml"])
def test_the_launcher_files_have_a_node_type_for_each_role(name: str) -> None:
    [document] = read(ROOT / name)
    assert document.cluster is not None
    roles = {node.labels["role"]: node.name for node in document.cluster.nodes}
    assert roles == {name: name for name in ("head", "generate", "train", "serve-target", "serve-draft")}
    assert list(document.recipes) == ["recipes/qwen3_8b_cluster.yaml"]


def test_no_node_of_the_launcher_files_has_a_public_address() -> None:
    aws, gcp = (yaml.safe_load((ROOT / name).read_text()) for name in ("cluster.yaml", "deploy/gcp.yaml"))
    assert aws["provider"]["use_internal_ips"]
    assert gcp["provider"]["use_internal_ips"]
    # Without a group of its own Ray makes one that admits SSH from everywhere.
    assert all(node["node_config"]["SecurityGroupIds"] for node in aws["available_node_types"].values())
    for node in gcp["available_node_types"].values():
        assert all("accessConfigs" not in interface for interface in node["node_config"]["networkInterfaces"])


def test_policies_and_budgets_select_pods_that_there_are() -> None:
    [job], [service] = ([tree["spec"] for tree in _objects(name)] for name in ("rayjob.yaml", "rayservice.yaml"))
    pods = [job["submitterPodTemplate"]["metadata"]["labels"]]
    for cluster in (job["rayClusterSpec"], service["rayClusterConfig"]):
        kinds = [("head", "headgroup", cluster["headGroupSpec"])]
        kinds += [("worker", group["groupName"], group) for group in cluster["workerGroupSpecs"]]
        for kind, name, group in kinds:
            # What KubeRay adds of its own.
            added = {"ray.io/node-type": kind, "ray.io/group": name}
            pods.append(group["template"]["metadata"]["labels"] | added)
    selectors = []
    for name in ("networkpolicy.yaml", "pdb.yaml"):
        for spec in (tree["spec"] for tree in _objects(name)):
            selectors.append(spec.get("podSelector") or spec["selector"])
            # Pods of other namespaces are not ours.
            peers = [peer for rule in spec.get("ingress", ()) for peer in rule["from"]]
            selectors += [peer["podSelector"] for peer in peers if "namespaceSelector" not in peer]
    assert len(selectors) == 8
    for selector in selectors:
        assert any(selector["matchLabels"].items() <= pod.items() for pod in pods), selector


def _change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set, or with `...` delete, what a dotted path names; numbers are positions in lists."""

    def change(tree: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        at: Any = tree
        for part in parents:
            at = at[part]
        if value is ...:
            del at[last]
        else:
            at[last] = value

    return change


HEAD = "RAY_AUTH_MODE=token RAY_enable_autoscaler_v2=1 ray start --head"

BROKEN_LAUNCHERS = [
    ("idle_timeout", 5, "unexpected"),
    ("head_node_type", "haed", "Ray refuses the file: `head_node_type` must be one of"),
    ("available_node_types.train.cpus", 8, "unexpected"),
    ("available_node_types.train.resources.GPU", 0.5, "0.5 is not of type 'integer'"),
    ("available_node_types.train.min_workers", 3, "train.min_workers: is 3, more than max_workers = 2"),
    ("available_node_types.train.max_workers", -1, "train.max_workers: must not be negative"),
    ("available_node_types.train.max_workers", 31, "train.max_workers: is 31, more than max_workers = 30"),
    ("available_node_types.train.labels.role", "tarin", "distill: no node is labelled role=train"),
    ("available_node_types.serve-draft.resources.GPU", 0, "serve.draft: no node has 4 CPU, 1 GPU on role=serve-draft"),
    ("available_node_types.serve-target.max_workers", 7, "serve.target: up to 8 x 8 CPU, 1 GPU on role=serve-target"),
    (
        "available_node_types.train.max_workers",
        1,
        "distill: up to 16 x 16 CPU, 1 GPU on role=train are asked for and 8",
    ),
    ("max_workers", 15, "available_node_types.generate.max_workers: is 16, more than max_workers = 15"),
    ("metadata.recipes", ["recipes/none.yaml"], "names the recipe 'recipes/none.yaml'"),
    ("worker_start_ray_commands.1", "ray start --address=$RAY_HEAD_IP:6379", "must set RAY_AUTH_MODE=token"),
    ("worker_start_ray_commands", ..., "worker_start_ray_commands: must hold a `ray start`"),
    ("head_start_ray_commands.1", f"{HEAD} --dashboard-host=0.0.0.0", "must keep the dashboard on 127.0.0.1"),
    ("head_start_ray_commands.1", "RAY_AUTH_MODE=token ray start --head", "must set RAY_enable_autoscaler_v2=1"),
    ("available_node_types", ..., "available_node_types: is needed"),
    ("available_node_types", [{"train": {}}], "cannot be read"),
    ("available_node_types.train", "big", "cannot be read"),
]

TARGETS = "spec.rayClusterConfig.workerGroupSpecs.0"

BROKEN_SERVICES = [
    ("kind", "RayServices", "kind: 'RayServices' is none of"),
    ("spec.rayClusterConfig.authOptions.mode", "disabled", "authOptions.mode"),
    ("spec.rayClusterConfig.authOptions", ..., "authOptions: Field required"),
    ("spec.rayClusterConfig.workerGroups", [], "spec.rayClusterConfig.workerGroups: Extra inputs"),
    (f"{TARGETS}.maxReplicas", 0, "group 'serve-target': minReplicas = 1, replicas = 1 and maxReplicas = 0"),
    (f"{TARGETS}.maxReplicas", 3, "serve.target: up to 8 x 8 CPU, 1 GPU on role=serve-target are asked for and 3 fit"),
    (f"{TARGETS}.labels.role", "target", "serve.target: no node is labelled role=serve-target"),
    (f"{TARGETS}.resources.GPU", "0", "too little GPU"),
    (f"{TARGETS}.resources", {}, None),
    (f"{TARGETS}.template.spec.containers.0.resources.limits.cpu", "lots", "limits.cpu"),
    (f"{TARGETS}.template.spec.containers.0.resources.limits.cpu", "4", "requests 8 of cpu, more than its limit 4"),
    (f"{TARGETS}.template.spec.containers.0.securityContext", {"runAsUser": 0}, "securityContext"),
    (f"{TARGETS}.template.spec.securityContext.runAsNonRoot", False, "runAsNonRoot"),
    (
        f"{TARGETS}.template.spec.containers.0.securityContext.readOnlyRootFilesystem",
        False,
        "securityContext.readOnlyRootFilesystem",
    ),
    (f"{TARGETS}.template.spec.volumes", [], "mounts 'shared', which is no volume of the pod"),
    ("spec.serveConfigV2", "applications: [{import_path: a:b}]", "import_path: is 'a:b'"),
    ("spec.serveConfigV2", "applications: [{import_path: 'serve_app.app:build', args: {drafts: x}}]", "args.drafts"),
    ("spec.serveConfigV2", "http_options: {prot: 1}", "prot"),
    ("spec.serveConfigV2", "applications: [", "cannot be read"),
    (f"{TARGETS}.rayStartParams", {"num-cpus": "8"}, "rayStartParams 'num-cpus'; KubeRay takes one"),
    (f"{TARGETS}.template.spec.restartPolicy", "Always", "the autoscaler needs restartPolicy Never"),
    (f"{TARGETS}.groupName", "serve-draft", "two groups are named 'serve-draft'"),
]

BROKEN_JOBS = [
    ("spec.entrypoint", "python -m pipelines.run 'recipes/x.yaml", "cannot be read: No closing quotation"),
    ("spec.entrypoint", "python -m pipelines.run", "names no recipe"),
    (
        "spec.entrypoint",
        "python -m pipelines.run recipes/qwen3_8b_cluster.yaml generate.gpus_per_actor=64",
        "generate: no node has",
    ),
    (
        "spec.entrypoint",
        "python -m pipelines.run recipes/qwen3_8b_cluster.yaml generate.gpu_per_actor=1",
        "did you mean 'gpus_per_actor'",
    ),
]


def _lint(tmp_path: Path, source: str, path: str, value: Any) -> str:
    tree = copy.deepcopy(yaml.safe_load((ROOT / source).read_text()))
    _change(path, value)(tree)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(tree))
    return check(changed, {})


@pytest.mark.parametrize(("path", "value", "message"), BROKEN_LAUNCHERS)
def test_a_broken_launcher_file_is_refused_in_one_line(tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as mistake:
        _lint(tmp_path, "cluster.yaml", path, value)
    assert message in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_a_node_type_without_a_bound_has_that_of_the_cluster(tmp_path: Path) -> None:
    assert _lint(tmp_path, "cluster.yaml", "available_node_types.train.max_workers", ...) == "Ray cluster"


@pytest.mark.parametrize(("path", "value", "message"), BROKEN_SERVICES)
def test_a_broken_service_is_refused_in_one_line(tmp_path: Path, path: str, value: Any, message: str | None) -> None:
    if message is None:
        # Without resources of its own a group offers the limits of its container.
        assert _lint(tmp_path, "deploy/kuberay/rayservice.yaml", path, value) == "RayService"
        return
    with pytest.raises(UserError) as mistake:
        _lint(tmp_path, "deploy/kuberay/rayservice.yaml", path, value)
    assert message in str(mistake.value)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(("path", "value", "message"), BROKEN_JOBS)
def test_a_broken_job_is_refused_in_one_line(tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as mistake:
        _lint(tmp_path, "deploy/kuberay/rayjob.yaml", path, value)
    assert message in str(mistake.value)
    assert "\n" not in str(mistake.value)


def _objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy" / "kuberay" / name).read_text()))


def test_nobody_reaches_a_pod_unless_a_policy_says_so() -> None:
    [deny] = [policy for policy in _objects("networkpolicy.yaml") if not policy["spec"].get("ingress")]
    assert set(deny["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    assert not deny["spec"].get("egress")
    wanted = deny["spec"]["podSelector"]["matchLabels"]
    for name, cluster in (("rayjob.yaml", "rayClusterSpec"), ("rayservice.yaml", "rayClusterConfig")):
        [tree] = _objects(name)
        spec = tree["spec"][cluster]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            labels = group["template"]["metadata"]["labels"]
            assert labels.items() >= wanted.items(), (name, group.get("groupName"))


def test_disruption_budgets_name_groups_that_exist() -> None:
    [service] = _objects("rayservice.yaml")
    groups = {group["groupName"] for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    selectors = [budget["spec"]["selector"]["matchLabels"] for budget in _objects("pdb.yaml")]
    named = [labels["ray.io/group"] for labels in selectors if "ray.io/group" in labels]
    assert named
    assert set(named) <= groups | {"headgroup"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- 1", "must be a mapping"),
        ("a: [", "is not valid YAML"),
        ("colour: red", "is neither a recipe"),
        ("generate: {max_actor: 2}", "generate.max_actor: unknown key (did you mean 'max_actors'?)"),
        ("apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: x}\nspec: {selector: {}}", "either min"),
        (
            "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: x}\n"
            "spec: {selector: {}, maxUnavailable: 1}",
            "minAvailable must be a count",
        ),
        (
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: x}\n"
            "spec: {podSelector: {}, policyTypes: [Ingress], ingress: [{ports: [{port: 1}]}]}",
            "spec.ingress.0.from: Field required",
        ),
        (
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: x}\n"
            "spec: {podSelector: {}, policyTypes: [Ingress], ingress: [{from: [{}], ports: [{port: 1}]}]}",
            "an empty peer names nobody",
        ),
        (
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: x}\nspec: {podSelector: {}, "
            "policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {}}], ports: [{port: 1}]}]}",
            "admits every namespace",
        ),
    ],
)
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


def test_a_recipe_beside_a_cluster_is_checked_against_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("generate: {gpus_per_actor: 2, labels: {role: generate}}")
    assert main([str(ROOT / "cluster.yaml"), str(recipe)]) == 2
    assert "generate: no node has 1 CPU, 2 GPU on role=generate: too little GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("quantity", "number"), [("2", 2), ("500m", 0.5), ("1.5", 1.5), ("4Ki", 4096), ("2G", 2e9)])
def test_quantities(quantity: str, number: float) -> None:
    assert amount(quantity) == number
