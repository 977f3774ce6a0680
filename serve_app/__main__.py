"""`python -m serve_app recipe.yaml [section.field=value ...]`: serve until SIGTERM or Ctrl-C, then drain."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
import threading

import yaml

from actors.cluster import connect
from actors.exit_codes import exit_code
from actors.stop_request import sigterm_interrupts
from unmask.config import Recipe
from unmask.placement import plan_line, serve_demands
from unmask.recipe import load_recipe

_SECTIONS = ("target", "serve")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; answers the exit code (see `actors.exit_codes`)."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    arguments = _parse(argv)

    def work() -> None:
        recipe = load_recipe(arguments.recipe, arguments.override)
        if arguments.plan:
            sys.stdout.write(plan(recipe))
            return
        with sigterm_interrupts():
            serve_until_stopped(recipe)

    return exit_code(work, stopped="stopped before it could serve")


def plan(recipe: Recipe) -> str:
    """The resolved sections of a recipe, and what will be placed where."""
    serve = recipe.serve
    tree = {name: dataclasses.asdict(getattr(recipe, name)) for name in _SECTIONS}
    lines = [f"{plan_line(demand)}\n" for demand in serve_demands(serve, has_draft=serve.draft is not None)]
    lines.append("# beside the ingress: a directory, no CPU; one HTTP proxy a node\n")
    return yaml.safe_dump(tree, sort_keys=False) + "".join(lines)


def serve_until_stopped(recipe: Recipe) -> None:
    """Join or start a cluster, serve, and drain on the first SIGTERM or SIGINT; a second one ends it at once.

    Raises:
        UserError: a recipe, target or draft that cannot be served.
        FaultError: the replicas could not be started.
    """
    from serve_app.handle import serve_pairing

    stopped = threading.Event()
    serve = recipe.serve
    demands = serve_demands(serve, has_draft=serve.draft is not None)
    connect(
        num_cpus=sum(demand.least * demand.resources.get("CPU", 0) for demand in demands),
        num_gpus=sum(demand.least * demand.resources.get("GPU", 0) for demand in demands),
    )
    handle = serve_pairing(recipe)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    sys.stdout.write(f"serving '{serve.name}' at {handle.url}/v1\n")
    sys.stdout.flush()
    stopped.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    handle.shutdown()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serve_app", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="a YAML recipe, such as recipes/demo.yaml")
    parser.add_argument("override", nargs="*", default=[], help="section.field=value, replacing the recipe's value")
    parser.add_argument("--plan", action="store_true", help="print the resolved recipe and its placement, and exit")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
