"""`unmask lint` on KubeRay's objects: each way to break one is a line that names it, and right ones pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.lint.__main__ import main
from pipelines.lint.commands import STAGES
from pipelines.lint.ray_groups import ISOLATED
from tests.lint_tools import ROOT, Edits, lint, objects, refused

SERVICE, JOB = "deploy/kuberay/rayservice.yaml", "deploy/kuberay/rayjob.yaml"
CLUSTER = "spec.rayClusterConfig"
TARGETS = f"{CLUSTER}.workerGroupSpecs.0"
POD = f"{TARGETS}.template.spec"
CONTAINER = f"{POD}.containers.0"
HEAD = f"{CLUSTER}.headGroupSpec"
DISABLED = [{"name": "RAY_AUTH_MODE", "value": "disabled"}]

BROKEN_SERVICES: list[tuple[str, Any, str]] = [
    ("kind", "RayServices", "kind: 'RayServices' is none of"),
    (f"{CLUSTER}.authOptions.mode", "disabled", "authOptions.mode"),
    (f"{CLUSTER}.authOptions", ..., "authOptions: Field required"),
    (f"{CLUSTER}.workerGroups", [], "spec.rayClusterConfig.workerGroups: Extra inputs"),
    (f"{TARGETS}.maxReplicas", 0, "group 'serve-target': minReplicas = 1, replicas = 1 and maxReplicas = 0"),
    (f"{TARGETS}.maxReplicas", 3, "serve.target: up to 8 x 8 CPU, 1 GPU on role=serve-target are asked for and 3 fit"),
    (f"{TARGETS}.labels.role", "target", "serve.target: no node is labelled role=serve-target"),
    (f"{TARGETS}.resources.GPU", "0", "too little GPU"),
    (f"{TARGETS}.resources.GPU", "8", "workerGroupSpecs.0: offers 8 GPU to Ray, more than the 1 of its container"),
    (f"{TARGETS}.resources.CPU", "16", "offers 16 CPU to Ray, more than the 8 of its container"),
    (f"{TARGETS}.resources.cpu", "16", "offers 16 CPU to Ray, more than the 8 of its container"),
    (f"{TARGETS}.resources.CPU", 8, "resources.CPU: Input should be a valid string"),
    (f"{HEAD}.rayStartParams", {"num-gpus": "1"}, "headGroupSpec: offers 1 GPU to Ray, more than the 0"),
    (f"{CONTAINER}.resources.limits.cpu", "lots", "limits.cpu"),
    (f"{CONTAINER}.resources.limits.cpus", "8", "limits.cpus"),
    (f"{CONTAINER}.resources.limits.cpu", "4", "requests 8 of cpu, more than its limit 4"),
    (f"{CONTAINER}.resources.limits.cpu", 4, "requests 8 of cpu, more than its limit 4"),
    (f"{CONTAINER}.securityContext", {"runAsUser": 0}, "securityContext"),
    (f"{CONTAINER}.securityContext.privileged", True, "securityContext.privileged"),
    (f"{CONTAINER}.securityContext.readOnlyRootFilesystem", False, "securityContext.readOnlyRootFilesystem"),
    (f"{CONTAINER}.env", DISABLED, "RAY_AUTH_MODE must be 'token'"),
    (
        f"{CONTAINER}.livenessProb",
        {},
        "'livenessProb' is no field of a Container that we allow (did you mean 'livenessPr",
    ),
    (f"{POD}.securityContext.runAsNonRoot", False, "runAsNonRoot"),
    (
        f"{POD}.imagePullSecret",
        [],
        "'imagePullSecret' is no field of a PodSpec that we allow (did you mean 'imagePullSe",
    ),
    (f"{POD}.hostNetwork", True, "template.spec.hostNetwork"),
    (f"{POD}.initContainers", [{"name": "a", "image": "b"}], "initContainers.0.securityContext: Field required"),
    (f"{POD}.volumes", [], "mounts 'shared', which is no volume of the pod"),
    (f"{POD}.restartPolicy", "Always", "the autoscaler needs restartPolicy Never"),
    (
        f"{TARGETS}.template.metadata.labels",
        {},
        "workerGroupSpecs.0: its pods need the label app.kubernetes.io/part-of",
    ),
    (
        f"{HEAD}.template.metadata.labels",
        {"a": "b"},
        "headGroupSpec: its pods need the label app.kubernetes.io/part-of",
    ),
    (f"{HEAD}.enableIngress", True, "headGroupSpec.enableIngress"),
    (f"{HEAD}.headService", {"spec": {"type": "LoadBalancer"}}, "headService of type LoadBalancer opens the head"),
    (f"{TARGETS}.rayStartParams", {"num-cpus": "8"}, "rayStartParams 'num-cpus'; KubeRay takes one"),
    (f"{TARGETS}.groupName", "serve-draft", "two groups are named 'serve-draft'"),
    (f"{CLUSTER}.autoscalerOptions.securityContext", ..., "autoscalerOptions: needs the securityContext of the cont"),
    (f"{CLUSTER}.autoscalerOptions.securityContext.capabilities", {"add": ["ALL"]}, "securityContext.capabilities"),
    (f"{CLUSTER}.autoscalerOptions.volumeMounts.0.name", "scratch", "mounts 'scratch', which is no volume of the pod"),
    (f"{CLUSTER}.autoscalerOptions.env", DISABLED, "RAY_AUTH_MODE must be 'token'"),
    ("spec.serveConfigV2", "applications: [{import_path: a:b}]", "import_path: is 'a:b'"),
    ("spec.serveConfigV2", "applications: [{import_path: 'serve_app.app:build', args: {drafts: x}}]", "args.drafts"),
    ("spec.serveConfigV2", "http_options: {port: 1}", "applications: Field required"),
    ("spec.serveConfigV2", "applications: [", "spec.serveConfigV2: is not valid YAML"),
    (
        "spec.serveConfigV2",
        "applications: []\napplications: []",
        "spec.serveConfigV2: is not valid YAML: 'applications'",
    ),
]

RECIPE = "recipes/qwen3_8b_cluster.yaml"
BROKEN_ENTRYPOINTS = [
    ("python -m pipelines.run 'recipes/x.yaml", "cannot be read: No closing quotation"),
    ("python -m pipelines.run", "spec.entrypoint: run: the following arguments are required: recipe"),
    (f"python -m pipelines.generat {RECIPE}", "spec.entrypoint: 'generat' is none of adapt"),
    (f"python -m pipelines.generat {RECIPE}", "(did you mean 'generate'?)"),
    (f"unmask lint {RECIPE}", "spec.entrypoint: 'lint' is none of"),
    (f"python -m pipeline.run {RECIPE}", "spec.entrypoint: runs no stage of ours"),
    (f"echo {RECIPE}", "spec.entrypoint: runs no stage of ours"),
    (f"python -m pipelines.run {RECIPE} --frehs", "spec.entrypoint: run: unrecognized arguments: --frehs"),
    (f"python -m pipelines.run {RECIPE} --fresh --resume", "spec.entrypoint: run: argument --resume: not allowed with"),
    (f"python -m pipelines.run {RECIPE} --help", "spec.entrypoint: run: --help ends the job at once"),
    (f"python -m pipelines.serve {RECIPE} --fresh", "spec.entrypoint: serve: has nothing to resume"),
    (f"python -m pipelines.run {RECIPE} generate", "must look like section.field=value"),
    (f"python -m pipelines.run {RECIPE} generate.gpus_per_actor=64", "generate: no node has"),
    (f"python -m pipelines.run {RECIPE} generate.gpu_per_actor=1", "did you mean 'gpus_per_actor'"),
    (
        f"cd /x && unmask generate {RECIPE} && unmask distill {RECIPE} distill.num_workers=17 distill.rows_per_step=17",
        "distill: up to 17 x",
    ),
    # What is trained on the service's nodes while it is up has no room beside it.
    (
        f"unmask on_policy {RECIPE} distill.num_workers=8 distill.min_workers=null distill.cpus_per_worker=8 "
        "distill.labels='{role: serve-target}'",
        "serve and distill:",
    ),
    (
        f"python -m pipelines.on_policy {RECIPE} evaluate.num_workers=4 evaluate.cpus_per_worker=4 "
        "evaluate.labels='{role: serve-draft}'",
        "serve and evaluate:",
    ),
]

BROKEN_JOBS: list[tuple[str, Any, str]] = [
    *(("spec.entrypoint", entrypoint, message) for entrypoint, message in BROKEN_ENTRYPOINTS),
    ("spec.entrypointNumGpus", 9, "entrypoint: no node has 9 GPU"),
    ("spec.entrypointResources", '{"disk": 1}', "entrypoint: no node has 1 disk"),
    ("spec.runtimeEnvYAML", "env_vars: {A: b", "spec.runtimeEnvYAML: is not valid YAML"),
    ("spec.runtimeEnvYAML", "pip", "spec.runtimeEnvYAML must be a mapping"),
    ("spec.runtimeEnvYAML", "env_var: {A: b}", "spec.runtimeEnvYAML.env_var: unknown key (did you mean 'env_vars'?)"),
    ("spec.submitterPodTemplate.spec.restartPolicy", "Always", "submitterPodTemplate.spec.restartPolicy must be Never"),
    ("spec.submitterPodTemplate.spec.restartPolicy", ..., "submitterPodTemplate.spec.restartPolicy must be Never"),
    ("spec.rayClusterSpec", ..., "needs either rayClusterSpec or clusterSelector"),
    (
        "spec.deletionStrategy",
        {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED"}}]},
        "KubeRay takes either deletionRules or shutdownAfterJobFinishes",
    ),
    ("spec.rayClusterSpec.autoscalerOptions.securityContext", ..., "needs the securityContext of the containers"),
]

APPLICATION = {
    "name": "a",
    "route_prefix": "/a",
    "import_path": "serve_app.app:build",
    "args": {"dtype": "bfloat16", "target_cpus": 8, "target_gpus": 1, "target_replicas": 5}
    | {"target_labels": {"role": "serve-target"}},
}
CONFINED = objects("rayjob.yaml")[0]["spec"]["rayClusterSpec"]["autoscalerOptions"]["securityContext"]
PROBE = {"httpGet": {"path": "/", "port": 8265}}
POD_FIELDS = {
    "imagePullSecrets": [{"name": "registry"}],
    "initContainers": [{"name": "a", "image": "b", "securityContext": CONFINED}],
    "runtimeClassName": "nvidia",
    "topologySpreadConstraints": [{"maxSkew": 1}],
}
CONTAINER_FIELDS = {"envFrom": [{"secretRef": {"name": "x"}}], "startupProbe": PROBE} | {
    "livenessProbe": PROBE,
    "readinessProbe": PROBE,
}

RIGHT_SERVICES: list[Edits] = [
    {f"{TARGETS}.resources": {}},  # the container's limits are what is offered
    {f"{TARGETS}.resources": {}, f"{CONTAINER}.resources.limits.cpu": ...},  # its requests are, then
    {f"{CONTAINER}.resources.limits.cpu": 8, f"{CONTAINER}.resources.requests.cpu": 8},
    {f"{POD}.{name}": value for name, value in POD_FIELDS.items()},
    {f"{CONTAINER}.{name}": value for name, value in CONTAINER_FIELDS.items()},
    {f"{CONTAINER}.env": [{"name": "RAY_AUTH_MODE", "value": "token"}]},
    {f"{TARGETS}.numOfHosts": 2, f"{TARGETS}.maxReplicas": 4},
    {f"{TARGETS}.scaleStrategy": {"workersToDelete": ["a"]}, f"{TARGETS}.idleTimeoutSeconds": 60},
    {
        f"{CLUSTER}.autoscalerOptions.{name}": value
        for name, value in {
            "image": "a",
            "imagePullPolicy": "IfNotPresent",
            "env": [{"name": "A", "value": "b"}],
            "envFrom": [{"secretRef": {"name": "x"}}],
        }.items()
    },
    {f"{CLUSTER}.networkPolicy": {"mode": "DenyAll"}, f"{HEAD}.headService": {"spec": {"type": "ClusterIP"}}},
]

RIGHT_JOBS: list[Edits] = [
    {"spec.entrypoint": f"python -m pipelines.run --fresh /opt/unmask/{RECIPE} generate.max_actors=8"},
    {"spec.entrypoint": f"cp -r /opt/unmask /tmp && A=b unmask evaluate {RECIPE} && unmask publish {RECIPE}"},
    {"spec.entrypoint": f"bash -c 'python -m pipelines.gate {RECIPE} serve.draft=/shared/draft'"},
    # Without a draft the service asks for no node of drafts.
    {"spec.entrypoint": f"python -m pipelines.serve {RECIPE} serve.max_draft_replicas=99"},
    {"spec.entrypoint": f"python -m pipelines.on_policy {RECIPE}"},
    {
        "spec.suspend": True,
        "spec.submitterConfig": {"backoffLimit": 1},
        "spec.deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteNone"}},
        "spec.entrypointNumCpus": 1,
        "spec.entrypointNumGpus": 1,
        "spec.entrypointResources": "{}",
        "spec.runtimeEnvYAML": "env_vars: {HF_HUB_OFFLINE: '1'}",
    },
    {"spec.rayClusterSpec": ..., "spec.clusterSelector": {"ray.io/cluster": "unmask"}},
]


@pytest.mark.parametrize(("path", "value", "message"), BROKEN_SERVICES)
def test_a_broken_service_is_refused_in_one_line(tmp_path: Path, path: str, value: Any, message: str) -> None:
    assert message in refused(tmp_path, SERVICE, path, value)


@pytest.mark.parametrize(("path", "value", "message"), BROKEN_JOBS)
def test_a_broken_job_is_refused_in_one_line(tmp_path: Path, path: str, value: Any, message: str) -> None:
    assert message in refused(tmp_path, JOB, path, value)


@pytest.mark.parametrize("edits", RIGHT_SERVICES)
def test_another_right_service_passes(tmp_path: Path, edits: Edits) -> None:
    assert lint(tmp_path, SERVICE, edits) == "RayService"


@pytest.mark.parametrize("edits", RIGHT_JOBS)
def test_another_right_job_passes(tmp_path: Path, edits: Edits) -> None:
    assert lint(tmp_path, JOB, edits) == "RayJob"


def test_applications_of_one_config_must_find_room_together(tmp_path: Path) -> None:
    one = {"applications": [APPLICATION]}
    two = {"applications": [APPLICATION, APPLICATION | {"name": "b", "route_prefix": "/b"}]}
    assert lint(tmp_path, SERVICE, {"spec.serveConfigV2": yaml.safe_dump(one)}) == "RayService"
    (tmp_path / "recipes").unlink()
    line = refused(tmp_path, SERVICE, "spec.serveConfigV2", yaml.safe_dump(two))
    assert (
        "application 'a', 'b': b's serve.target: up to 5 x 8 CPU, 1 GPU on role=serve-target are asked for and 3"
        in line
    )


def test_a_job_needs_the_groups_of_its_own_stage_only(tmp_path: Path) -> None:
    [job] = objects("rayjob.yaml")
    generate = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    edits = {"spec.rayClusterSpec.workerGroupSpecs": [generate]}
    assert lint(tmp_path, JOB, {"spec.entrypoint": f"unmask generate {RECIPE}", **edits}) == "RayJob"
    (tmp_path / "recipes").unlink()
    assert "distill: no node is labelled role=train" in refused(tmp_path, JOB, *next(iter(edits.items())))


def test_a_cluster_without_a_recipe_beside_it_is_refused(tmp_path: Path) -> None:
    [job] = objects("rayjob.yaml")
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "x"}}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster | {"spec": job["spec"]["rayClusterSpec"]}))
    assert main([str(path)]) == 2
    assert main([str(path), str(ROOT / RECIPE)]) == 0


def test_every_stage_of_the_command_line_is_known() -> None:
    modules = (ROOT / "pipelines").glob("*.py")
    assert {path.stem for path in modules if 'if __name__ == "__main__"' in path.read_text()} == set(STAGES)


def test_policies_and_budgets_select_pods_that_there_are() -> None:
    [job], [service] = ([tree["spec"] for tree in objects(name)] for name in ("rayjob.yaml", "rayservice.yaml"))
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
        for spec in (tree["spec"] for tree in objects(name)):
            selectors.append(spec.get("podSelector") or spec["selector"])
            # Pods of other namespaces are not ours.
            peers = [peer for rule in spec.get("ingress", ()) for peer in rule["from"]]
            selectors += [peer["podSelector"] for peer in peers if "namespaceSelector" not in peer]
    assert len(selectors) == 8
    for selector in selectors:
        assert any(selector["matchLabels"].items() <= pod.items() for pod in pods), selector


def test_nobody_reaches_a_pod_unless_a_policy_says_so() -> None:
    [deny] = [policy for policy in objects("networkpolicy.yaml") if not policy["spec"].get("ingress")]
    assert set(deny["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    assert not deny["spec"].get("egress")
    # The labels that lint demands of every pod.
    assert deny["spec"]["podSelector"] == {"matchLabels": ISOLATED}


def test_disruption_budgets_name_groups_that_exist() -> None:
    [service] = objects("rayservice.yaml")
    groups = {group["groupName"] for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    selectors = [budget["spec"]["selector"]["matchLabels"] for budget in objects("pdb.yaml")]
    named = [labels["ray.io/group"] for labels in selectors if "ray.io/group" in labels]
    assert named
    assert set(named) <= groups | {"headgroup"}
