"""The shapes of the Kubernetes objects in `deploy/kuberay`: the fields that we use, and no others.

Field names are Kubernetes' own. An unknown field is refused: the API server drops it, and what it was to do with it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
Labels = dict[str, str]


class Shape(BaseModel):
    """An object whose fields are all known."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Shape):
    """ObjectMeta, of an object that has a name."""

    name: Name
    namespace: Name | None = None
    labels: Labels = Field(default_factory=dict)
    annotations: Labels = Field(default_factory=dict)


class PodMetadata(Shape):
    """ObjectMeta of a template."""

    labels: Labels = Field(default_factory=dict)
    annotations: Labels = Field(default_factory=dict)


class Resources(Shape):
    """ResourceRequirements."""

    requests: dict[str, Quantity] = Field(default_factory=dict)
    limits: dict[str, Quantity] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _requests_within_limits(self) -> Resources:
        for name in self.requests.keys() & self.limits.keys():
            if amount(self.requests[name]) > amount(self.limits[name]):
                raise ValueError(f"requests {self.requests[name]} of {name}, more than its limit {self.limits[name]}")
        return self


class SeccompProfile(Shape):
    """SeccompProfile."""

    type: Literal["RuntimeDefault", "Localhost"]
    localhostProfile: str | None = None


class PodSecurity(Shape):
    """PodSecurityContext; a pod of ours never runs as root."""

    runAsNonRoot: Literal[True]
    runAsUser: Annotated[int, Field(gt=0)] | None = None
    fsGroup: int | None = None
    seccompProfile: SeccompProfile


class Capabilities(Shape):
    """Capabilities; ours keep none."""

    drop: list[Literal["ALL"]] = Field(min_length=1)


class ContainerSecurity(Shape):
    """SecurityContext of a container."""

    allowPrivilegeEscalation: Literal[False]
    readOnlyRootFilesystem: Literal[True]
    capabilities: Capabilities


class EnvVar(Shape):
    """EnvVar."""

    name: str
    value: str | None = None
    valueFrom: dict[str, Any] | None = None


class Container(Shape):
    """Container."""

    name: Name
    image: str
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    command: list[str] = Field(default_factory=list)
    args: list[str] = Field(default_factory=list)
    env: list[EnvVar] = Field(default_factory=list)
    resources: Resources
    ports: list[dict[str, str | int]] = Field(default_factory=list)
    volumeMounts: list[dict[str, str | bool]] = Field(default_factory=list)
    securityContext: ContainerSecurity


class PodSpec(Shape):
    """PodSpec."""

    containers: list[Container] = Field(min_length=1)
    automountServiceAccountToken: bool
    serviceAccountName: Name | None = None
    securityContext: PodSecurity
    nodeSelector: Labels = Field(default_factory=dict)
    tolerations: list[dict[str, str | int]] = Field(default_factory=list)
    affinity: dict[str, Any] | None = None
    priorityClassName: str | None = None
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    terminationGracePeriodSeconds: Annotated[int, Field(ge=0)] | None = None
    volumes: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _mounts_are_volumes(self) -> PodSpec:
        names = {volume.get("name") for volume in self.volumes}
        for mount in (mount for container in self.containers for mount in container.volumeMounts):
            if mount.get("name") not in names:
                raise ValueError(f"mounts '{mount.get('name')}', which is no volume of the pod")
        return self


class PodTemplate(Shape):
    """PodTemplateSpec."""

    metadata: PodMetadata = Field(default_factory=PodMetadata)
    spec: PodSpec


class Selector(Shape):
    """LabelSelector."""

    matchLabels: Labels = Field(default_factory=dict)
    matchExpressions: list[dict[str, Any]] = Field(default_factory=list)


class Peer(Shape):
    """NetworkPolicyPeer."""

    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None
    ipBlock: dict[str, str | list[str]] | None = None

    @model_validator(mode="after")
    def _names_somebody(self) -> Peer:
        if not self.model_fields_set:
            raise ValueError("an empty peer names nobody; Kubernetes refuses it")
        if self.namespaceSelector is not None and not self.namespaceSelector.model_fields_set:
            raise ValueError("an empty namespaceSelector admits every namespace")
        return self


class Port(Shape):
    """NetworkPolicyPort."""

    protocol: Literal["TCP", "UDP", "SCTP"] = "TCP"
    port: int | str
    endPort: int | None = None


class Ingress(Shape):
    """NetworkPolicyIngressRule; one without peers would admit everybody."""

    peers: list[Peer] = Field(alias="from", min_length=1)
    ports: list[Port] = Field(default_factory=list)


class Egress(Shape):
    """NetworkPolicyEgressRule; one without peers would reach everybody."""

    to: list[Peer] = Field(min_length=1)
    ports: list[Port] = Field(default_factory=list)


class NetworkPolicySpec(Shape):
    """NetworkPolicySpec."""

    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]] = Field(min_length=1)
    ingress: list[Ingress] = Field(default_factory=list)
    egress: list[Egress] = Field(default_factory=list)


class NetworkPolicy(Shape):
    """NetworkPolicy."""

    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: NetworkPolicySpec


class DisruptionBudgetSpec(Shape):
    """PodDisruptionBudgetSpec."""

    selector: Selector
    minAvailable: int | str | None = None
    maxUnavailable: int | str | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> DisruptionBudgetSpec:
        if (self.minAvailable is None) == (self.maxUnavailable is None):
            raise ValueError("needs either minAvailable or maxUnavailable")
        # The owner of the pods is a RayCluster, which has no scale subresource to take a share of.
        if not isinstance(self.minAvailable, int):
            raise ValueError("minAvailable must be a count: else Kubernetes lets no pod of a RayCluster go")
        return self


class DisruptionBudget(Shape):
    """PodDisruptionBudget."""

    apiVersion: Literal["policy/v1"]
    kind: Literal["PodDisruptionBudget"]
    metadata: Metadata
    spec: DisruptionBudgetSpec


_UNITS = {"m": 1e-3, "": 1.0} | {
    f"{letter}{binary}": (1024.0 if binary else 1000.0) ** power
    for power, letter in enumerate("KMGTPE", start=1)
    for binary in ("", "i")
}
_UNITS["k"] = _UNITS.pop("K")


def amount(quantity: str) -> float:
    """A Kubernetes quantity as a number."""
    digits = quantity.rstrip("mkKMGTPEi")
    return float(digits) * _UNITS[quantity[len(digits) :]]
