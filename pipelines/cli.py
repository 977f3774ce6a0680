"""The command line that all pipelines share: `recipe.yaml section.field=value ... [--plan] [--fresh]`.

`unmask STAGE ...` is `python -m pipelines.STAGE ...`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import pkgutil
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from actors.exit_codes import USER_ERROR, exit_code, fail
from actors.stop_request import sigterm_interrupts
from unmask.config import Recipe
from unmask.errors import ConfigError, nearest
from unmask.recipe import load_recipe, to_tree

_HELPERS = ("chat_client", "cli", "gate_report", "placement", "progress", "student_evaluation", "training")

_STOPPED = "stopped; run the same command again to go on from here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """What the command line asks for. `fresh` starts over where an unfinished run would be resumed."""

    recipe: Recipe
    fresh: bool = False


def run_pipeline(
    main: Callable[[Invocation], str],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    plan: Callable[[Recipe], str] = lambda recipe: "",
) -> int:
    """Parse the command line, run a pipeline and turn the outcome into an exit code.

    Args:
        main: does the work and returns the last line to print. It imports Ray and torch itself, so that a wrong
            recipe is refused in well under a second.
        argv: arguments; None takes the process's own.
        plan: the placement lines that `--plan` prints under the resolved recipe.

    Returns:
        The exit code (see `actors.exit_codes`).
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request

    def work() -> None:
        arguments = make_parser(description).parse_intermixed_args(argv)
        recipe = with_absolute_run_dir(load_recipe(arguments.recipe, arguments.override))
        if arguments.plan:
            sys.stdout.write(yaml.safe_dump(to_tree(recipe), sort_keys=False) + plan(recipe))
            return
        with sigterm_interrupts():
            last_line = main(Invocation(recipe=recipe, fresh=arguments.fresh))
        sys.stdout.write(last_line + "\n")

    return exit_code(work, stopped=_STOPPED)


def main() -> None:
    """Entry point of the `unmask` command: run the stage that the first argument names."""
    stages = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    stages = [name for name in stages if name not in _HELPERS]
    stage = sys.argv[1] if len(sys.argv) > 1 else ""
    if stage not in stages:
        usage = f"give a stage{nearest(stage, stages)}: unmask {{{','.join(stages)}}} recipe.yaml ..."
        sys.exit(fail(USER_ERROR, usage))
    sys.argv[1:] = sys.argv[2:]
    runpy.run_module(f"pipelines.{stage}", run_name="__main__", alter_sys=True)


def with_absolute_run_dir(recipe: Recipe) -> Recipe:
    """The recipe with `run_dir` made absolute, since workers run in other folders than this process.

    A submitted job runs in a copy of the working directory that goes when the job ends, so a relative run directory
    is taken from the home of the node's user there.
    """
    copied = "runtime_resources" in Path.cwd().parts
    base = Path.home() if copied else Path.cwd()
    run_dir = base / Path(recipe.run_dir).expanduser()
    if copied:
        logging.getLogger(__name__).info("run_dir is %s", run_dir)
    return dataclasses.replace(recipe, run_dir=str(run_dir))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help shows the usage)")


def make_parser(description: str) -> argparse.ArgumentParser:
    """The parser of every stage's command line; it raises ConfigError."""
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("recipe", help="a YAML recipe, such as recipes/demo.yaml")
    parser.add_argument("override", nargs="*", default=[], help="section.field=value, replacing the recipe's value")
    parser.add_argument("--plan", action="store_true", help="print the resolved recipe and its placement, and exit")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on with an unfinished run (this is the default)")
    start.add_argument("--fresh", action="store_true", help="delete what an earlier run of this stage left, start over")
    return parser
