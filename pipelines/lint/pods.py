"""Shapes of pods: what confines them is checked field by field, the other fields by their names."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from pipelines.lint.kubernetes import Count, Labels, Name, QuantityOrInt, Shape, amount
from unmask.errors import nearest

ResourceName = Annotated[str, StringConstraints(pattern=r"^(cpu|memory|ephemeral-storage|hugepages-.+|.+/.+)$")]


class KnownFields(BaseModel):
    """An object some of whose fields are checked, while others may only be of a known name."""

    model_config = ConfigDict(extra="allow", strict=True)
    others: ClassVar[frozenset[str]] = frozenset()
    """Fields of Kubernetes that are taken as they are."""

    @model_validator(mode="after")
    def _fields_are_known(self) -> KnownFields:
        for name in self.model_extra or {}:
            if name not in self.others:
                hint = nearest(name, {*type(self).model_fields, *self.others})
                raise ValueError(f"'{name}' is no field of a {type(self).__name__} that we allow{hint}")
        return self


class PodMetadata(Shape):
    """ObjectMeta of a template."""

    labels: Labels = Field(default_factory=dict)
    annotations: Labels = Field(default_factory=dict)


class Resources(Shape):
    """ResourceRequirements."""

    requests: dict[ResourceName, QuantityOrInt] = Field(default_factory=dict)
    limits: dict[ResourceName, QuantityOrInt] = Field(default_factory=dict)
    claims: list[dict[str, str]] = Field(default_factory=list)

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
    runAsGroup: Count | None = None
    fsGroup: Count | None = None
    fsGroupChangePolicy: Literal["OnRootMismatch", "Always"] | None = None
    supplementalGroups: list[Count] = Field(default_factory=list)
    supplementalGroupsPolicy: Literal["Merge", "Strict"] | None = None
    seccompProfile: SeccompProfile
    seLinuxOptions: dict[str, str] | None = None


class Capabilities(Shape):
    """Capabilities; ours keep none."""

    drop: list[Literal["ALL"]] = Field(min_length=1)


class ContainerSecurity(Shape):
    """SecurityContext of a container."""

    allowPrivilegeEscalation: Literal[False]
    readOnlyRootFilesystem: Literal[True]
    capabilities: Capabilities
    privileged: Literal[False] = False
    runAsNonRoot: Literal[True] | None = None
    runAsUser: Annotated[int, Field(gt=0)] | None = None
    runAsGroup: Count | None = None
    seccompProfile: SeccompProfile | None = None
    seLinuxOptions: dict[str, str] | None = None


class EnvVar(Shape):
    """EnvVar."""

    name: str
    value: str | None = None
    valueFrom: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _keeps_the_token(self) -> EnvVar:
        if self.name == "RAY_AUTH_MODE" and self.value != "token":
            raise ValueError("RAY_AUTH_MODE must be 'token': else whoever reaches the pod runs code in it; remove it")
        return self


PullPolicy = Literal["Always", "IfNotPresent", "Never"]
Mounts = list[dict[str, str | bool]]


class Container(KnownFields):
    """Container."""

    others: ClassVar[frozenset[str]] = frozenset(
        {"workingDir", "envFrom", "resizePolicy", "restartPolicy", "restartPolicyRules", "volumeDevices", "lifecycle"}
        | {"livenessProbe", "readinessProbe", "startupProbe", "stdin", "stdinOnce", "tty"}
        | {"terminationMessagePath", "terminationMessagePolicy"}
    )

    name: Name
    image: str
    imagePullPolicy: PullPolicy | None = None
    command: list[str] = Field(default_factory=list)
    args: list[str] = Field(default_factory=list)
    env: list[EnvVar] = Field(default_factory=list)
    resources: Resources
    ports: list[dict[str, str | int]] = Field(default_factory=list)
    volumeMounts: Mounts = Field(default_factory=list)
    securityContext: ContainerSecurity


class InitContainer(Container):
    """A container that ends before the others begin, within what they have."""

    resources: Resources = Field(default_factory=Resources)


class PodSpec(KnownFields):
    """PodSpec."""

    others: ClassVar[frozenset[str]] = frozenset(
        {"imagePullSecrets", "runtimeClassName", "topologySpreadConstraints", "schedulerName", "nodeName", "priority"}
        | {"preemptionPolicy", "overhead", "schedulingGates", "readinessGates", "resourceClaims", "resources"}
        | {"dnsPolicy", "dnsConfig", "hostAliases", "hostname", "hostnameOverride", "subdomain", "setHostnameAsFQDN"}
        | {"activeDeadlineSeconds", "enableServiceLinks", "serviceAccount", "shareProcessNamespace", "hostUsers", "os"}
    )

    containers: list[Container] = Field(min_length=1)
    initContainers: list[InitContainer] = Field(default_factory=list)
    automountServiceAccountToken: bool
    serviceAccountName: Name | None = None
    securityContext: PodSecurity
    # Policies do not reach a pod in its node's network, and its neighbours' processes are open to one in its node's.
    hostNetwork: Literal[False] = False
    hostPID: Literal[False] = False
    hostIPC: Literal[False] = False
    nodeSelector: Labels = Field(default_factory=dict)
    tolerations: list[dict[str, str | int]] = Field(default_factory=list)
    affinity: dict[str, Any] | None = None
    priorityClassName: str | None = None
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    terminationGracePeriodSeconds: Count | None = None
    volumes: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _mounts_are_volumes(self) -> PodSpec:
        for container in (*self.initContainers, *self.containers):
            self.require_volumes(container.volumeMounts)
        return self

    def require_volumes(self, mounts: Mounts) -> None:
        """Refuse mounts of what is no volume of the pod. Raises ValueError."""
        names = {volume.get("name") for volume in self.volumes}
        for mount in mounts:
            if mount.get("name") not in names:
                raise ValueError(f"mounts '{mount.get('name')}', which is no volume of the pod")


class PodTemplate(Shape):
    """PodTemplateSpec."""

    metadata: PodMetadata = Field(default_factory=PodMetadata)
    spec: PodSpec
