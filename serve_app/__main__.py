"""`python -m serve_app recipe.yaml [section.field=value ...]`: serve until SIGTERM or Ctrl-C, then drain."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
import threading

import yaml

from actors.cluster import FaultError, connect
from actors.stop_request import sigterm_interrupts
from unmask.config import Recipe
from unmask.errors import UserError
from unmask.placement import serve_demands
from unmask.recipe import load_recipe

_SECTIONS = ("target", "serve")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; answers the exit code: 0 done, 2 the user can mend it, 3 a fault, 130 stopped early."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    arguments = _parse(argv)
    try:
        recipe = load_recipe(arguments.recipe, arguments.override)
        if arguments.plan:
            sys.stdout.write(plan(recipe))
            return 0
        with sigterm_interrupts():
            serve_until_stopped(recipe)
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped before it could serve\n")
        return 130
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except FaultError as error:
        sys.stderr.write(f"error: {error}\n")
        return 3
    return 0


def plan(recipe: Recipe) -> str:
    """The resolved sections of a recipe, and what will be placed where."""
    serve = recipe.serve
    tree = {name: dataclasses.asdict(getattr(recipe, name)) for name in _SECTIONS}
    lines = []
    if serve.serves_target:
        lines.append(f"# target: {serve.target_replicas} x ({serve.target_cpus:g} CPU, {serve.target_gpus:g} GPU)")
    if serve.draft is not None:
        lines.append(f"# draft: {serve.draft_replicas} x ({serve.draft_cpus:g} CPU, {serve.draft_gpus:g} GPU)")
    if serve.diffusion is not None:
        each = f"({serve.diffusion_cpus:g} CPU, {serve.diffusion_gpus:g} GPU)"
        lines.append(f"# diffusion: {serve.diffusion_replicas} x {each}")
    lines.append("# ingress and directory: 1 each, no CPU reserved; one HTTP proxy a node")
    return yaml.safe_dump(tree, sort_keys=False) + "\n".join(lines) + "\n"


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
