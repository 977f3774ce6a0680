"""`unmask lint` on files of Ray's launcher: each way to break one is a line that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.lint.__main__ import main, read
from tests.lint_tools import ROOT, Edits, lint, refused

HEAD = (
    "RAY_AUTH_MODE=token RAY_enable_autoscaler_v2=1 ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml"
)
WORKER = "RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379"
TRAIN = "available_node_types.train"
OPEN_GROUP = {"GroupName": "x", "IpPermissions": [{"FromPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}
OPEN_GROUP_6 = {"GroupName": "x", "IpPermissions": [{"FromPort": 22, "Ipv6Ranges": [{"CidrIpv6": "::/0"}]}]}

BROKEN: list[tuple[str, Any, str]] = [
    ("idle_timeout", 5, "unexpected"),
    ("head_node_type", "haed", "Ray refuses the file: `head_node_type` must be one of"),
    (f"{TRAIN}.cpus", 8, "unexpected"),
    (f"{TRAIN}.resources.GPU", 0.5, "0.5 is not of type 'integer'"),
    (f"{TRAIN}.min_workers", 3, "train.min_workers: is 3, more than max_workers = 2"),
    (f"{TRAIN}.max_workers", -1, "train.max_workers: must not be negative"),
    (f"{TRAIN}.max_workers", 31, "train.max_workers: is 31, more than max_workers = 30"),
    (f"{TRAIN}.labels.role", "tarin", "distill: no node is labelled role=train"),
    ("available_node_types.serve-draft.resources.GPU", 0, "serve.draft: no node has 4 CPU, 1 GPU on role=serve-draft"),
    ("available_node_types.serve-target.max_workers", 7, "serve.target: up to 8 x 8 CPU, 1 GPU on role=serve-target"),
    (f"{TRAIN}.max_workers", 1, "distill: up to 16 x 16 CPU, 1 GPU on role=train are asked for and 8"),
    ("max_workers", 15, "available_node_types.generate.max_workers: is 16, more than max_workers = 15"),
    ("available_node_types", ..., "available_node_types: is needed"),
    ("available_node_types", [{"train": {}}], "cannot be read"),
    (TRAIN, "big", "cannot be read"),
    ("metadata.recipes", ["recipes/none.yaml"], "names the recipe 'recipes/none.yaml'"),
    ("metadata.recipes", ["recipes/qwen3_8b_cluster.yaml generate.gpu=2"], "generate.gpu: unknown key"),
    ("metadata.recipes", "recipes/demo.yaml", "metadata.recipes: must be a list of recipes"),
    ("metadata.recipes", [], "names no recipe, so that no room was checked: list what runs there in metadata.recipes"),
    ("metadata", ..., "names no recipe, so that no room was checked"),
    ("worker_start_ray_commands.1", "ray start --address=$RAY_HEAD_IP:6379", "must set RAY_AUTH_MODE=token"),
    (
        "worker_start_ray_commands.1",
        f"RAY_AUTH_MODE=token {WORKER.replace('token', 'disabled')}",
        "RAY_AUTH_MODE=token",
    ),
    ("worker_start_ray_commands.1", "echo RAY_AUTH_MODE=token; ray start --address=h", "must set RAY_AUTH_MODE=token"),
    ("worker_start_ray_commands", ..., "worker_start_ray_commands: must hold a `ray start`"),
    *(
        ("worker_start_ray_commands.1", f"{WORKER} {flag}", f"must not set --{flag[2:].split('=')[0].split()[0]}")
        for flag in ("--num-gpus=8", "--num-cpus 4", "--resources='{\"a\": 1}'", "--labels=role=train", "--memory=1")
    ),
    ("head_start_ray_commands.1", f"{HEAD} --num-cpus=8", "sets --num-cpus=8 where the head's type says 0"),
    ("head_start_ray_commands.1", f"{HEAD} --num-gpus 1", "sets --num-gpus=1 where the head's type says 0"),
    ("head_start_ray_commands.1", f"{HEAD} --labels=role=train", "must not set --labels"),
    ("head_start_ray_commands.1", f"{HEAD} --dashboard-host=0.0.0.0", "must keep the dashboard on 127.0.0.1"),
    (
        "head_start_ray_commands.1",
        f"{HEAD} --dashboard-host=127.0.0.1 --dashboard-host 0.0.0.0",
        "must keep the dashboard on 127.0.0.1",
    ),
    ("head_start_ray_commands.1", "RAY_AUTH_MODE=token ray start --head", "must set RAY_enable_autoscaler_v2=1"),
    ("head_start_ray_commands.1", HEAD.split(" --auto")[0], "must give --autoscaling-config=~/ray_bootstrap_config"),
    ("provider.use_internal_ips", False, "provider.use_internal_ips: must be true"),
    ("provider.use_internal_ips", ..., "provider.use_internal_ips: must be true"),
    ("provider.region", ..., "provider.region: is needed on aws"),
    ("provider.security_group", OPEN_GROUP, "provider.security_group: admits everybody (0.0.0.0/0)"),
    ("provider.security_group", OPEN_GROUP_6, "provider.security_group: admits everybody (::/0)"),
    (f"{TRAIN}.node_config.SecurityGroupIds", ..., "train.node_config.SecurityGroupIds: is needed"),
    ("available_node_types.head.node_config.SecurityGroupIds", [], "head.node_config.SecurityGroupIds: is needed"),
    (
        f"{TRAIN}.node_config.NetworkInterfaces",
        [{"Groups": ["sg-1"], "AssociatePublicIpAddress": True}],
        "train.node_config.NetworkInterfaces: gives the node a public address",
    ),
    ("file_mounts", ..., "file_mounts: must bring ~/.ray/auth_token"),
    ("file_mounts", {"/home/unmask/.ray/token": "~/.ray/auth_token"}, "file_mounts: must bring ~/.ray/auth_token"),
    ("docker.image", ..., "docker.image: is needed"),
    ("docker.container_name", ..., "docker.container_name: is needed"),
]

BROKEN_GCP: list[tuple[str, Any, str]] = [
    ("provider.project_id", ..., "provider.project_id: is needed on gcp"),
    ("provider.availability_zone", ..., "provider.availability_zone: is needed on gcp"),
    (
        f"{TRAIN}.node_config.networkInterfaces.0.accessConfigs",
        [{"type": "ONE_TO_ONE_NAT"}],
        "train.node_config.networkInterfaces: accessConfigs give the node a public address",
    ),
]

RIGHT: list[Edits] = [
    {f"{TRAIN}.max_workers": ...},  # it has the bound of the cluster
    {"head_start_ray_commands.1": f"{HEAD} --num-cpus=0 --dashboard-host localhost"},
    {"head_start_ray_commands.1": f"export RAY_AUTH_MODE=token && ulimit -n 65536; {HEAD.split(' ', 1)[1]}"},
    {"worker_start_ray_commands.1": f"bash -lc '{WORKER}'"},
    {"docker.image": ..., "docker.head_image": "a", "docker.worker_image": "b"},
    {"docker": ...},
    {"file_mounts": {"/home/unmask/.ray": "~/.ray"}},
    {"provider.security_group": {"GroupName": "x", "IpPermissions": [{"IpRanges": [{"CidrIp": "10.0.0.0/8"}]}]}},
    {f"{TRAIN}.node_config.SecurityGroupIds": ..., f"{TRAIN}.node_config.NetworkInterfaces": [{"Groups": ["sg-1"]}]},
    {"metadata.recipes": ["recipes/qwen3_8b_cluster.yaml generate.max_actors=8"]},
]


@pytest.mark.parametrize(("path", "value", "message"), BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, path: str, value: Any, message: str) -> None:
    assert message in refused(tmp_path, "cluster.yaml", path, value)


@pytest.mark.parametrize(("path", "value", "message"), BROKEN_GCP)
def test_a_broken_file_of_google_cloud_is_refused_in_one_line(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    assert message in refused(tmp_path, "deploy/gcp.yaml", path, value)


@pytest.mark.parametrize("edits", RIGHT)
def test_another_right_file_passes(tmp_path: Path, edits: Edits) -> None:
    assert lint(tmp_path, "cluster.yaml", edits) == "Ray cluster"


def test_a_recipe_beside_a_file_that_names_none_is_what_runs_there(tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    del tree["metadata"]
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(tree))
    assert main([str(tmp_path / "cluster.yaml"), str(ROOT / "recipes" / "qwen3_8b_cluster.yaml")]) == 0


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/gcp.yaml"])
def test_the_files_have_a_node_type_for_each_role(name: str) -> None:
    [document] = read(ROOT / name)
    assert document.cluster is not None
    roles = {node.labels["role"]: node.name for node in document.cluster.nodes}
    assert roles == {name: name for name in ("head", "generate", "train", "serve-target", "serve-draft")}
    assert [command.recipe for command in document.commands] == ["recipes/qwen3_8b_cluster.yaml"]
