"""Code answers: a model's Python and a row's tests, run together under confinement."""

from __future__ import annotations

import re
from typing import Any

from unmask.errors import ConfigError, PromptError
from unmask.verification.sandbox import Limits, run_confined

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class CodeVerifier:
    """A response is right if its code and then the reference's tests run to their ends.

    What holds is safety: nothing outside of the sample's own process changes. A sample that studies the runner could
    still forge a verdict, as anything that runs in the process of its tests can.

    Raises:
        ConfigError: this machine cannot confine code.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        if not run_confined("import socket", _REFUSED, self._limits):
            raise ConfigError(
                "model-written code cannot be confined on this machine: it takes Linux on x86-64 or arm64 with seccomp",
                field="generate.verifier",
            )

    def reference(self, value: Any) -> str:
        """The tests: Python text, or a list of statements. Raises PromptError for anything else."""
        tests = "\n".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        if not isinstance(tests, str) or not tests.strip():
            raise PromptError("the reference must be Python text or a list of statements", field="generate.reference")
        return tests

    def is_right(self, response: str, reference: str) -> bool:
        """See Verifier."""
        return run_confined(extract_code(response), reference, self._limits)


def extract_code(response: str) -> str:
    """The last fenced block of a response, or all of it."""
    blocks = _FENCED.findall(response)
    return blocks[-1] if blocks else response


_REFUSED = """
try:
    socket.socket()
except OSError:
    pass
else:
    raise SystemExit
"""
