"""The model cards of published drafts and diffusion LMs: what they are for, how they were measured, how to use them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from unmask.models.dflash import DFlashConfig
from unmask.types import TargetRecord

_CARD = """---
{front}---

# {name}

A DFlash block-diffusion draft (arXiv 2602.06036) for `{base}`: {layers} layers, block size {block_size}. It
proposes up to {k} tokens at a time; the target verifies them, so the text is distributed as the target's own.

## Evaluation

{table}

Acceptance length is 1 + accepted drafts / verifications (the bonus token included), greedy, float32, batch 1. The
n-gram column fills the same number of drafts from the prompt, else from n-grams of the training responses.

## Use

    unmask serve recipe.yaml serve.draft=DIRECTORY
    {vllm}

## Target

It is refused beside any other target than this one:

{record}
"""

_DIFFUSION_CARD = """---
{front}---

# {name}

A masked-diffusion language model, distilled from its own verified responses ({made_by}). Its source is
`{source}`, revision `{revision}`.

## Evaluation

{table}

Greedy decoding of held-out prompts. Accuracy is given with its 95 % Wilson interval; tokens per forward (TPF) leave
the padding after the end of a response out.

## Use

    from unmask.models import families
    network = families.load("DIRECTORY")

Decoders are in `unmask.decoding`. `run.yaml` and `provenance.json` say how the checkpoint was made.
"""


def model_card(
    name: str,
    base: str,
    license_name: str,
    config: DFlashConfig,
    target: TargetRecord,
    sets: Mapping[str, Mapping[str, Any]],
    *,
    form: Literal["zlab", "speculators"] = "zlab",
) -> str:
    """Markdown with the front matter that hubs read.

    Args:
        sets: summaries of an evaluation by name of the prompt set; empty if the draft was not evaluated.
        form: layout of the draft's `config.json`; speculators' names the target.
    """
    k = config.block_size - 1
    options = json.dumps({"method": "dflash", "model": "DIRECTORY", "num_speculative_tokens": k})
    of_target = f"vllm serve {base} --speculative-config '{options}'"
    front = {
        "base_model": base,
        "license": license_name,
        "library_name": "unmask",
        "tags": ["dflash", "speculative-decoding", "block-diffusion"],
    }
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        name=name,
        base=base,
        layers=config.num_hidden_layers,
        block_size=config.block_size,
        k=k,
        vllm=of_target if form == "zlab" else "vllm serve DIRECTORY",
        table=_table(sets),
        record="\n".join(f"    {field}: {getattr(target, field)}" for field in target.__slots__),
    )


def _table(sets: Mapping[str, Mapping[str, Any]]) -> str:
    if not sets:
        return "Not evaluated."
    lines = ["| prompts | acceptance length | 95 % interval | n-grams | identical text |", "|---|---|---|---|---|"]
    for name, s in sets.items():
        low, high = s["interval95"]
        lines.append(
            f"| {name} | {s['acceptance_length']:.2f} | {low:.2f} to {high:.2f} "
            f"| {s['acceptance_length_ngram']:.2f} | {s['identical']}/{s['prompts']} |"
        )
    return "\n".join(lines)


def diffusion_card(
    name: str, base: str, license_name: str, lineage: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Markdown with the front matter that hubs read.

    Args:
        lineage: of the checkpoint (`unmask.diffusion_checkpoints`).
        rows: of an evaluation; empty if the checkpoint was not evaluated.
    """
    front = {
        "base_model": base,
        "license": license_name,
        "library_name": "unmask",
        "tags": ["diffusion-language-model", lineage["made_by"]],
    }
    return _DIFFUSION_CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        name=name,
        made_by=lineage["made_by"],
        source=lineage["source"],
        revision=lineage["source_record"]["revision"],
        table=_diffusion_table(rows),
    )


def _diffusion_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not evaluated."
    lines = ["| prompts | checkpoint | decoder | accuracy, % | forwards | TPF |", "|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["ci95"]
        lines.append(
            f"| {row['set']} ({row['n']}) | {row['checkpoint']} | {row['decoder']['name']} "
            f"| {row['accuracy']:.1f} ({low:.1f} to {high:.1f}) | {row['nfe']:.1f} | {row['tpf']:.2f} |"
        )
    return "\n".join(lines)
