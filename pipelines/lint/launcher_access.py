"""Who reaches the nodes of a launcher file: nobody from outside, and nobody without the token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.lint.document import is_everywhere
from unmask.errors import ConfigError

_NEEDED = {"aws": ("region",), "gcp": ("project_id", "region", "availability_zone")}
"""By provider: fields without which Ray stops at an assertion or a missing key."""

_TOKEN = ".ray/auth_token"  # noqa: S105 # a path


def check_access(tree: dict[str, Any]) -> None:
    """Refuse a file whose nodes others could reach, or could not start for want of the token. Raises ConfigError."""
    provider = tree["provider"]
    for name in _NEEDED.get(provider["type"], ()):
        if not provider.get(name):
            raise ConfigError(f"is needed on {provider['type']}", field=f"provider.{name}")
    if provider.get("use_internal_ips") is not True:
        raise ConfigError("must be true: else every node gets a public address", field="provider.use_internal_ips")
    permissions = (provider.get("security_group") or {}).get("IpPermissions") or []
    for address in _strings(permissions, ("CidrIp", "CidrIpv6")):
        if is_everywhere(address):
            raise ConfigError(
                f"admits everybody ({address}); name the addresses that are meant", field="provider.security_group"
            )
    for name, node in tree["available_node_types"].items():
        _check_node(provider["type"], node["node_config"], f"available_node_types.{name}.node_config")
    mounted = [str(remote).rstrip("/") for remote in tree.get("file_mounts") or {}]
    if not any(remote.endswith((_TOKEN, ".ray")) for remote in mounted):
        raise ConfigError(
            f"must bring ~/{_TOKEN} to {_TOKEN} in the home of the nodes' user: no node starts without the token",
            field="file_mounts",
        )


def _check_node(provider: str, config: dict[str, Any], where: str) -> None:
    if provider == "aws":
        interfaces = config.get("NetworkInterfaces") or []
        groups = [config.get("SecurityGroupIds")] if not interfaces else [one.get("Groups") for one in interfaces]
        if not all(groups):
            raise ConfigError(
                "is needed: without a group of its own Ray makes one that admits SSH from everywhere",
                field=f"{where}.SecurityGroupIds",
            )
        if any(interface.get("AssociatePublicIpAddress") for interface in interfaces):
            raise ConfigError("gives the node a public address; remove it", field=f"{where}.NetworkInterfaces")
    if provider == "gcp" and any("accessConfigs" in one for one in config.get("networkInterfaces") or []):
        raise ConfigError(
            "accessConfigs give the node a public address; remove them", field=f"{where}.networkInterfaces"
        )


def _strings(tree: Any, names: tuple[str, ...]) -> Iterator[str]:
    """Values of such names, however deep they lie."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name in names:
                yield str(value)
            yield from _strings(value, names)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value, names)
