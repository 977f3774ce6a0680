"""What no line of the project may do: properties of the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ("unmask", "engines", "actors", "pipelines", "serve_app")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.AST]:
    assert len(FILES) > 100
    return {path: ast.parse(path.read_text()) for path in FILES}


def test_remote_code_is_never_trusted(trees: dict[Path, ast.AST]) -> None:
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def test_nothing_is_unpickled_or_evaluated(trees: dict[Path, ast.AST]) -> None:
    forbidden = {"pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "torch.load", "eval", "exec"}
    forbidden |= {"yaml.load", "yaml.unsafe_load", "marshal.loads", "shelve.open", "numpy.load", "np.load"}
    for path, tree in trees.items():
        found = {name for name, _ in calls(tree)} & forbidden
        # The sandbox's own process runs what a model wrote: that is its purpose.
        allowed = {"exec"} if path == ROOT / "unmask" / "verification" / "confined.py" else set()
        assert found <= allowed, path


def test_no_shell_and_no_assertion_guards_input(trees: dict[Path, ast.AST]) -> None:
    """`python -O` removes assertions (CVE-2026-41523): none may be there to be removed."""
    for path, tree in trees.items():
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], path
        for name, call in calls(tree):
            assert name not in ("os.system", "os.popen"), path
            assert not any(keyword.arg == "shell" for keyword in call.keywords), path


def test_the_service_opens_no_connection_for_a_request(trees: dict[Path, ast.AST]) -> None:
    """Content that a request names is never fetched: the service has no HTTP client."""
    clients = {"httpx", "requests", "urllib.request", "aiohttp", "http.client"}
    for path, tree in trees.items():
        # `handle.py` is the operator's side: it asks the service that it has started whether it is ready.
        if path.parts[len(ROOT.parts)] != "serve_app" or path.name == "handle.py":
            continue
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & clients, path


def test_request_fields_are_an_allow_list(trees: dict[Path, ast.AST]) -> None:
    """No endpoint passes a body on by `**`: what reaches an engine is named field by field."""
    for path, tree in trees.items():
        if path.parts[len(ROOT.parts)] != "serve_app":
            continue
        for name, call in calls(tree):
            for keyword in call.keywords:
                spread = ast.unparse(keyword.value) if keyword.arg is None else ""
                assert "body" not in spread, f"{path}: {name}(**{spread})"


def _run_optimised(*suites: str) -> subprocess.CompletedProcess[str]:
    """`python -O` removes assertions, but for those of test files: pytest has rewritten them before."""
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", *suites]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_the_security_tests_hold_without_assertions_in_the_code() -> None:
    suites = [f"tests/unit/serve_app/test_{name}.py" for name in ("auth", "limits", "protocol")]
    result = _run_optimised(*suites, "tests/security/test_checkpoints.py", "tests/security/test_requests.py")
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.slow
def test_an_optimised_run_still_tells_right_from_wrong(tmp_path: Path) -> None:
    """Without this the test above might pass because nothing is asserted at all."""
    right, wrong = tmp_path / "test_right.py", tmp_path / "test_wrong.py"
    right.write_text("def test_right():\n    assert not __debug__, 'not optimised'\n")
    wrong.write_text("def test_wrong():\n    assert __debug__\n")
    assert _run_optimised(str(right)).returncode == 0
    assert _run_optimised(str(wrong)).returncode == 1


def test_locked_packages_carry_hashes() -> None:
    for name in ("cpu.lock", "torch-cpu.lock"):
        lines = (ROOT / "requirements" / name).read_text().replace("\\\n", " ").splitlines()
        pinned = [line for line in lines if line.strip() and not line.lstrip().startswith(("#", "--"))]
        assert pinned
        for line in pinned:
            assert "==" in line, line
            assert "--hash=sha256:" in line, line


def test_the_container_runs_as_a_user_and_holds_no_secret() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    users = [line.split()[1] for line in text.splitlines() if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("root", "0")
    for word in ("TOKEN=", "PASSWORD", "SECRET=", "API_KEY="):
        assert word not in text.upper()


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/gcp.yaml"])
def test_clusters_ask_for_a_token_and_keep_the_dashboard_local(name: str) -> None:
    text = (ROOT / name).read_text()
    assert yaml.safe_load(text)
    assert "RAY_AUTH_MODE=token" in text.replace('"', "").replace(": ", "=")
    assert "--dashboard-host=0.0.0.0" not in text
    for port in ("10001", "6379", "8265"):
        assert f"FromPort: {port}" not in text
