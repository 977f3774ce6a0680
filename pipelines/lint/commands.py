"""What a job's command runs: its stage, its recipe, and what the two ask for at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.cli import make_parser
from pipelines.lint.document import Command
from pipelines.lint.shell import program, simple_commands
from unmask.config import Recipe
from unmask.errors import ConfigError, nearest
from unmask.placement import Demand, serve_demands, stage_demands

STAGES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "adapt": (("adapt",),),
    "generate": (("generate",),),
    "distill": (("distill",),),
    "evaluate": (("evaluate",),),
    "publish": (),
    "gate": (("serve",), ("evaluate",)),
    "serve": (("serve",),),
    "run": (("adapt",), ("generate",), ("distill",), ("evaluate",), ("serve",)),
    # From the first round on the service stays up while a draft is distilled and evaluated.
    "on_policy": (("generate",), ("serve", "distill"), ("serve", "evaluate")),
}
"""By module of `pipelines`: the demands of a recipe that it has at the same time."""

_FIELD = "spec.entrypoint"


def commands_of(entrypoint: str) -> list[Command]:
    """The stages that a job's command runs.

    Raises:
        ConfigError: it runs none, one that there is not, or gives it words that it does not know.
        ValueError: a quote that is not closed.
    """
    commands = [
        _command(stage, arguments)
        for words in simple_commands(entrypoint)
        for stage, *arguments in [_stage_and_words(words)]
        if stage
    ]
    if not commands:
        raise ConfigError("runs no stage of ours, as `python -m pipelines.run RECIPE.yaml` does", field=_FIELD)
    return commands


def _stage_and_words(words: Sequence[str]) -> list[str]:
    """The stage that a command runs and the words behind it; an empty stage if it is another program."""
    by_name = program(words) == "unmask"
    for at, word in enumerate(words[:-1]):
        if by_name and program([word]) == "unmask":
            return list(words[at + 1 :])
        if word == "-m" and words[at + 1].startswith("pipelines."):
            return [words[at + 1].removeprefix("pipelines."), *words[at + 2 :]]
    return [""]


def _command(stage: str, words: Sequence[str]) -> Command:
    if stage not in STAGES:
        raise ConfigError(f"'{stage}' is none of {', '.join(sorted(STAGES))}{nearest(stage, STAGES)}", field=_FIELD)
    if {"-h", "--help"} & set(words):
        raise ConfigError(f"{stage}: --help ends the job at once; remove it", field=_FIELD)
    try:
        arguments = make_parser("").parse_intermixed_args(words)
    except ConfigError as error:
        raise ConfigError(f"{stage}: {error}", field=_FIELD) from None
    if stage == "serve" and (arguments.fresh or arguments.resume):
        raise ConfigError("serve: has nothing to resume; remove --fresh and --resume", field=_FIELD)
    return Command(recipe=arguments.recipe, overrides=arguments.override, stage=stage)


def asked_by(recipe: Recipe, stage: str | None) -> dict[str, list[Demand]]:
    """What a stage of a recipe asks for, by what runs at the same time; each stage's where none is named."""
    demands = stage_demands(recipe)
    if stage is None:
        return demands
    if stage == "serve":
        demands["serve"] = serve_demands(recipe.serve, has_draft=recipe.serve.draft is not None)
    elif stage == "run":
        # A student is not served by the line, and adapted only where no teacher is there yet.
        unused = ["adapt"] if recipe.student is None or recipe.student.teacher else []
        unused += [] if recipe.student is None else ["serve"]
        demands |= {name: [] for name in unused}
    return {" and ".join(names): [demand for name in names for demand in demands[name]] for names in STAGES[stage]}
