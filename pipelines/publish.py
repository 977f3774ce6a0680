"""A draft or student to an immutable version: `python -m pipelines.publish recipe.yaml [section.field=value ...]`.

The version is a digest of weights, a draft's confidence head, `config.json`, and what they were made for or from: what
is published is never changed, and publishing the same twice gives the same directory.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from pipelines.cli import Invocation, run_pipeline
from unmask.config import Recipe, StudentConfig
from unmask.errors import CheckpointError
from unmask.files import CHECKSUMS, atomic_directory, sha256_file, verify_directory
from unmask.provenance import PROVENANCE, RUN_YAML
from unmask.recipe import digest
from unmask.targets import describe_target, resolve_target


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """A published draft or student."""

    version: str
    path: str


def publish(recipe: Recipe, run_dir: Path) -> PublishReport:
    """Publish what `distill` made (or `publish.draft`) under `<directory>/<name>-<version>`.

    Raises:
        PairingError: the draft's records do not fit the target.
        CheckpointError: a damaged draft or student, or a published directory that has been tampered with.
    """
    if recipe.student is not None:
        return _publish_student(recipe, recipe.student, run_dir)
    from unmask.checkpoints import check_pairing, load_confidence, load_draft, save_draft
    from unmask.model_card import model_card

    config = recipe.publish
    source = Path(config.draft) if config.draft else run_dir / "draft" / "final"
    target_path = resolve_target(recipe.target.model, recipe.target.revision)
    target = describe_target(target_path)
    check_pairing(source, target, adopt=config.adopt)
    form = [config.format, _name_for_loaders(recipe, target_path)] if config.format != "zlab" else []
    version = digest(_content_digest(source), target, *form)[:12]
    path = _directory(recipe, run_dir, f"{config.name or 'dflash'}-{version}")
    if _is_published(path):
        return PublishReport(version=version, path=str(path))
    draft = load_draft(source, target=target)
    evaluation = run_dir / "evaluation" / "evaluation.json"
    sets = json.loads(evaluation.read_text())["sets"] if evaluation.is_file() and not config.draft else {}
    card = model_card(path.name, recipe.target.model, config.license, draft.config, target, sets, form=config.format)
    records = {n: (source / n).read_text() for n in (RUN_YAML, PROVENANCE) if (source / n).is_file()}
    save_draft(
        draft,
        path,
        target,
        texts={"README.md": card, **records},
        form=config.format,
        verifier=_name_for_loaders(recipe, target_path),
        confidence=load_confidence(source),
    )
    return PublishReport(version=version, path=str(path))


def _publish_student(recipe: Recipe, student: StudentConfig, run_dir: Path) -> PublishReport:
    from unmask.diffusion_checkpoints import read_lineage
    from unmask.model_card import diffusion_card

    config = recipe.publish
    source = Path(config.draft) if config.draft else run_dir / "student" / "final"
    lineage = read_lineage(source)
    version = digest(_content_digest(source), lineage)[:12]
    path = _directory(recipe, run_dir, f"{config.name or student.objective}-{version}")
    if _is_published(path):
        return PublishReport(version=version, path=str(path))
    evaluation = run_dir / "evaluation" / "evaluation.json"
    rows = json.loads(evaluation.read_text())["rows"] if evaluation.is_file() and not config.draft else []
    card = diffusion_card(path.name, recipe.target.model, config.license, lineage, rows)
    with atomic_directory(path) as partial:
        for file in source.iterdir():
            if file.name != CHECKSUMS:
                shutil.copyfile(file, partial / file.name)
        (partial / "README.md").write_text(card)
    return PublishReport(version=version, path=str(path))


def _directory(recipe: Recipe, run_dir: Path, name: str) -> Path:
    return Path(recipe.publish.directory or run_dir / "published") / name


def _is_published(path: Path) -> bool:
    if path.exists() and not verify_directory(path):
        raise CheckpointError(f"'{path}' has been changed since it was published; remove it and publish again")
    return path.exists()


def _name_for_loaders(recipe: Recipe, target_path: Path) -> str:
    """How loaders that are not ours find the target: by its id on the hub, or where it lies."""
    model = recipe.target.model
    on_hub = not model.startswith("embedded:") and not Path(model).expanduser().is_dir()
    return model if on_hub else str(target_path)


def _content_digest(source: Path) -> str:
    """Of everything that makes a checkpoint behave as it does."""
    from unmask.checkpoints import CONFIDENCE

    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"'{source}' holds no safetensors weights")
    files = [source / "config.json", *weights, source / CONFIDENCE]
    return digest({file.relative_to(source).as_posix(): sha256_file(file) for file in files if file.is_file()})


def main(invocation: Invocation) -> str:
    """Run the stage; the last line to print."""
    report = publish(invocation.recipe, Path(invocation.recipe.run_dir))
    return f"published version {report.version} in {report.path}"


if __name__ == "__main__":
    sys.exit(
        run_pipeline(main, description=(__doc__ or "").splitlines()[0], plan=lambda _: "# publish: this process\n")
    )
