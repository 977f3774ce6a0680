"""What the image and the page for one's own machines say, beside what recipes ask for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from unmask.placement import NodeType, misfit, stage_demands
from unmask.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
RECIPE = load_recipe("recipes/qwen3_8b_cluster.yaml")


def test_a_login_shell_of_the_image_finds_its_programs() -> None:
    [path] = re.findall(r"echo 'export (PATH=\S+):\$PATH' > /etc/profile\.d/\w+\.sh", DOCKERFILE)
    assert f"ENV {path}:$PATH" in DOCKERFILE


def test_docker_hands_the_gpus_to_the_image() -> None:
    assert "NVIDIA_VISIBLE_DEVICES=all" in DOCKERFILE
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in DOCKERFILE


def test_launched_nodes_make_the_folder_of_the_recipes_for_the_images_user() -> None:
    [user] = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    for name in ("cluster.yaml", "deploy/gcp.yaml"):
        commands = yaml.safe_load((ROOT / name).read_text())["initialization_commands"]
        made = [shlex.split(command, comments=True) for command in commands if command.startswith("sudo install")]
        assert made == [["sudo", "install", "-d", "-o", user, "-g", user, "/shared/unmask"]]
        assert Path(RECIPE.run_dir).is_relative_to("/shared/unmask")


def test_ones_own_machines_have_room_for_the_recipe() -> None:
    """As many of each role as are needed: each process finds a host of its role that is large enough."""
    page = (ROOT / "deploy" / "onprem.md").read_text().replace("\\\n", " ")
    nodes = []
    for command in re.findall(r"^ray start .*$", page, re.MULTILINE):
        options = dict(word[2:].split("=", 1) for word in shlex.split(command) if word.startswith("--") and "=" in word)
        role = options["labels"].removeprefix("role=")
        resources = {"CPU": float(options["num-cpus"]), "GPU": float(options.get("num-gpus", 0))}
        nodes.append(NodeType(name=role, resources=resources, labels={"role": role}))
    assert [node.name for node in nodes] == ["head", "generate", "train", "serve-target", "serve-draft"]
    assert misfit([demand for demands in stage_demands(RECIPE).values() for demand in demands], nodes) is None
