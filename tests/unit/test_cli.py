"""The shared command line: exit codes, one-line errors, and no heavy import before a recipe is accepted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.cluster import FaultError
from actors.exit_codes import DONE, FAULT, INTERRUPTED, USER_ERROR
from pipelines.cli import Invocation, run_pipeline
from unmask.errors import UserError


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text("generate: {max_new_tokens: 8}\n")
    return str(path)


def test_overrides_and_flags_reach_the_pipeline(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Invocation] = []

    def main(invocation: Invocation) -> str:
        seen.append(invocation)
        return "well done"

    assert run_pipeline(main, [recipe, "generate.seed=4", "--fresh", "target.engine.max_num_seqs=2"]) == DONE
    assert seen[0].recipe.generate.seed == 4
    assert seen[0].recipe.generate.max_new_tokens == 8
    assert seen[0].recipe.target.engine == {"max_num_seqs": 2}
    assert seen[0].fresh
    assert capsys.readouterr().out == "well done\n"
    assert run_pipeline(main, [recipe, "--resume"]) == DONE
    assert not seen[1].fresh


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate.max_actor=1"], "generate.max_actor: unknown key (did you mean 'max_actors'?)"),
        (["generate.top_p=7"], "generate.top_p: must be in (0, 1]"),
        (["seed"], "override 'seed' must look like section.field=value"),
        (["--fresh", "--resume"], "not allowed with argument"),
        (["--frehs"], "unrecognized arguments: --frehs"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    recipe: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_pipeline(lambda invocation: "never", [recipe, *arguments]) == USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("bad", field="a.b"), USER_ERROR),
        (FaultError("node lost"), FAULT),
        (KeyboardInterrupt(), INTERRUPTED),
    ],
)
def test_outcomes_have_their_exit_codes(recipe: str, raised: BaseException, code: int) -> None:
    def main(invocation: Invocation) -> str:
        raise raised

    assert run_pipeline(main, [recipe]) == code


def test_sigterm_stops_as_ctrl_c_does(recipe: str) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def main(invocation: Invocation) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return "never"

    assert run_pipeline(main, [recipe]) == INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) == before


def test_plan_prints_and_does_nothing(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_pipeline(lambda invocation: pytest.fail("ran"), [recipe, "--plan"], plan=lambda r: "# two actors\n") == 0
    output = capsys.readouterr().out
    assert "max_new_tokens: 8" in output
    assert output.endswith("# two actors\n")


def test_wrong_recipe_is_refused_before_anything_heavy_is_imported() -> None:
    """Nor does a driver import torch later: it lives as long as the job."""
    code = (
        "import sys, pipelines.generate as g, pipelines.run, actors.generation_pool, actors.generator\n"
        "import pipelines.evaluate, pipelines.publish, pipelines.gate, pipelines.on_policy\n"
        "from pipelines.cli import run_pipeline\n"
        "assert run_pipeline(g.main, ['missing.yaml']) == 2\n"
        "print(*sorted({'ray', 'torch', 'vllm', 'transformers'} & sys.modules.keys()))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "\n"
    assert (
        output.stderr == "error: no recipe at 'missing.yaml'; give the path of a YAML file such as recipes/demo.yaml\n"
    )


def test_unmask_command_names_the_stages() -> None:
    command = [sys.executable, "-c", "from pipelines.cli import main; main()"]
    wrong = subprocess.run([*command, "generat"], capture_output=True, text=True, check=False)
    assert wrong.returncode == USER_ERROR
    assert "did you mean 'generate'?" in wrong.stderr
    shown = subprocess.run([*command, "generate", "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "--plan" in shown.stdout
