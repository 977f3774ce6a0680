"""What the draft benchmark measures with: target, trajectories, evaluation sets, training runs, and rows of results."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.batched_generation import BatchedLlama, Response
from unmask.config import DistillConfig, DraftConfig
from unmask.decoding.speculative import speculative_decode
from unmask.evaluation.metrics import acceptance_by_position, acceptance_length, bootstrap_interval
from unmask.evaluation.replay import replay_draft
from unmask.models.dflash import DFlashDraft
from unmask.models.draft_start import draft_sizes, new_draft
from unmask.models.target import TargetModel
from unmask.targets import resolve_target, unused_special_token
from unmask.training.draft_trainer import DraftTrainer
from unmask.training.feature_cache import FeatureCache
from unmask.training.flops import step_flops
from unmask.training.head import TrainingHead
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.types import SamplingOptions

PEAK_FLOPS = 800e12
"""bfloat16 products measured on an H100."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes and time shares (minutes) of a run."""

    device: str
    shape: DraftConfig
    config: DistillConfig
    rows: int
    prompt_columns: int
    max_new_tokens: int
    eval_prompts: int
    real_prompts: int
    generate: float
    main: float
    comparison: float
    ablation: float


class Prompts:
    """Prompts of the data folder under the target's chat template."""

    def __init__(self, folder: Path, tokenizer: Any, longest: int) -> None:
        self.folder, self.tokenizer, self.longest = folder, tokenizer, longest

    def train(self) -> list[list[int]]:
        """GSM8K's training questions with the self-instruct prompts among them."""
        questions = [row["question"] for row in self._rows("gsm8k/train")]
        broad = [
            "\n".join(filter(None, (row["instruction"], row["instances"][0]["input"])))
            for name in ("selfinstruct/seed_tasks", "selfinstruct/user_oriented_instructions")
            for row in self._rows(name)
        ]
        step = max(1, len(questions) // len(broad))
        mixed: list[str] = []
        for index, text in enumerate(broad):
            mixed += [text, *questions[index * step : (index + 1) * step]]
        return self._encode(mixed + questions[len(broad) * step :])

    def gsm8k(self) -> list[list[int]]:
        """Held-out GSM8K questions."""
        return self._encode([row["question"] for row in self._rows("gsm8k/test")])

    def mtbench(self) -> list[list[int]]:
        """First turns of MT-bench."""
        return self._encode([row["turns"][0] for row in self._rows("mtbench/question")])

    def _rows(self, name: str) -> list[dict[str, Any]]:
        with gzip.open(self.folder / f"{name}.jsonl.gz", "rt") as file:
            return [json.loads(line) for line in file]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the texts that fit."""
        encoded = (
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in texts
        )
        return [ids for ids in encoded if len(ids) <= self.longest]


def repetitive(tokens: Sequence[int]) -> bool:
    """Whether more than 30 % of a response's 4-grams occurred before in it."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return bool(grams) and 1 - len(set(grams)) / len(grams) > 0.3


class Benchmark:
    """Target, trajectories and evaluation sets, and the rows measured on them."""

    def __init__(self, scale: Scale, folder: Path, out: Path) -> None:
        self.scale, self.out, self.start = scale, out, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {"scale": dataclasses.asdict(scale)}
        path = resolve_target("embedded:smollm2-135m-instruct")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        dtype = torch.bfloat16 if scale.device == "cuda" else torch.float32
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        model.to(scale.device)  # type: ignore[arg-type]
        self.sizes = draft_sizes(model.config, scale.shape, unused_special_token(self.tokenizer))
        self.target = TargetModel(model, self.sizes.target_layer_ids)
        self.path, self.prompts = path, Prompts(folder, self.tokenizer, scale.prompt_columns)
        self.k = scale.shape.block_size - 1
        self.train: list[Response] = []
        self.sets: dict[str, list[Response]] = {}

    def log(self, text: str) -> None:
        """One line with the clock."""
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def save(self) -> None:
        """Rows, and beside them what else was measured."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.rows, indent=1) + "\n")
        self.out.with_suffix(".run.json").write_text(json.dumps(self.notes, indent=1) + "\n")

    def generate(self) -> None:
        """Evaluation sets first, then training responses while time lasts: greedy once, then sampled at 0.7."""
        scale = self.scale
        sampler = BatchedLlama(
            self.target.model, rows=scale.rows, prompt_columns=scale.prompt_columns,
            max_new_tokens=scale.max_new_tokens, beyond=self.k, eos_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        sampled = {"gsm8k": self.prompts.gsm8k()[: scale.eval_prompts], "mtbench": self.prompts.mtbench()}
        if scale.device == "cpu":
            sampled = {name: prompts[: scale.eval_prompts] for name, prompts in sampled.items()}
        for name, prompts in sampled.items():
            for temperature in (0.0, 1.0):
                self.sets[f"{name}@{temperature:g}"] = sampler.generate(prompts[: scale.rows], temperature)
        prompts = self.prompts.train()
        # Rows of one batch end together, so those of like length go together; batches themselves are shuffled.
        batches = [prompts[i : i + scale.rows] for i in range(0, len(prompts), scale.rows)]
        start = time.monotonic()
        for number, (temperature, batch) in enumerate(itertools.product((0.0, 0.7, 1.0, 0.7), batches)):
            if number and time.monotonic() - start > 60 * scale.generate:
                break
            self.train += sampler.generate(batch, temperature)
        tokens, seconds = sum(len(r.tokens) for r in self.train), time.monotonic() - start
        self.notes["trajectories"] = {"responses": len(self.train), "tokens": tokens, "seconds": seconds}
        self.log(f"{len(self.train)} responses, {tokens} tokens in {seconds:.1f} s")
        # All features are kept, final states included: what does not fit is not trained on.
        row_bytes = (len(self.sizes.target_layer_ids) + 1) * self.sizes.hidden_size * self.target.embedding.itemsize
        room = itertools.accumulate(row_bytes * (len(r.prompt) + len(r.tokens)) for r in self.train)
        self.train = self.train[: sum(used < scale.config.feature_cache_gb * 1e9 for used in room)]
        for name, responses in self.sets.items():
            self.log(f"{name}: {len(responses)} prompts, {sum(repetitive(r.tokens) for r in responses)} repetitive")

    def features(self, config: DistillConfig, *, final: bool) -> FeatureCache:
        """The training set, packed, with the target's features kept where the recipe says."""
        sequences = SequenceSet(
            [TokenSequence(r.prompt + r.tokens, len(r.prompt)) for r in self.train],
            batch_size=1, seed=config.seed, tokens_per_step=config.tokens_per_step,
        )  # fmt: skip
        device = self.scale.device if config.feature_cache_device == "training" else "cpu"
        cache = FeatureCache(
            self.target, sequences, int(config.feature_cache_gb * 1e9), 65536 if device == "cuda" else 4096,
            final=final, device=device,
        )  # fmt: skip
        start = time.monotonic()
        kept = cache.warm_up()
        self.log(f"features of {kept}/{len(sequences)} sequences kept, {cache.bytes / 1e9:.1f} GB "
                 f"in {time.monotonic() - start:.1f} s")  # fmt: skip
        return cache

    def trainer(self, config: DistillConfig, features: FeatureCache, init: str = "target") -> DraftTrainer:
        """A fresh draft and its trainer."""
        draft = new_draft(self.sizes, self.target.model, init, config.seed).to(self.scale.device)
        head = TrainingHead(self.target.lm_head, [], config.head_negatives)
        return DraftTrainer(draft.train().requires_grad_(True), features, head, config)

    def run(self, trainer: Any, *, seconds: float | None = None, steps: int | None = None) -> dict[str, float]:
        """Train to a budget; speed is taken after the first ten steps, which compile."""
        start = warm = time.monotonic()
        done, progress, metrics = 0, 0.0, {}
        while progress < 1:
            metrics = trainer.step(progress)
            done += 1
            if done == 10 or done % 20 == 0:
                self._synchronise()
            if done == 10:
                warm = time.monotonic()
            now = time.monotonic()
            progress = done / steps if steps else (now - start) / seconds if seconds else 1.0
            if done % 200 == 0:
                self.log(f"step {done} loss {float(metrics['loss']):.3f}")
        self._synchronise()
        step_seconds = (time.monotonic() - (warm if done > 10 else start)) / (done - 10 if done > 10 else done)
        loss = float(metrics["loss"])
        self.log(f"{done} steps, {1000 * step_seconds:.1f} ms a step, loss {loss:.3f}")
        return {"steps": done, "step_seconds": step_seconds, "seconds": time.monotonic() - start, "loss": loss}

    def _synchronise(self) -> None:
        if self.scale.device == "cuda":
            torch.cuda.synchronize()

    def measure(
        self, draft: DFlashDraft, trainer: str, recipe: str, config: DistillConfig, run: dict[str, float]
    ) -> None:
        """Replay a draft on every set; one row a set, and one without repetitive responses."""
        steps, per_step = run["steps"], config.tokens_per_step or 0
        sequences = len(self.train) / max(sum(len(r.prompt) + len(r.tokens) for r in self.train) / per_step, 1)
        shared = {
            "trainer": trainer, "recipe": recipe, "seed": config.seed, "gpu_minutes": run["seconds"] / 60,
            "tokens_seen": int(steps * per_step), "samples_per_second": sequences / run["step_seconds"],
            "mfu": self.flops(config) / PEAK_FLOPS / run["step_seconds"], "loop": "replay",
            "steps": int(steps), "step_ms": 1000 * run["step_seconds"], "loss": run["loss"],
        }  # fmt: skip
        for name, responses in self.sets.items():
            texts = [TokenSequence(r.prompt + r.tokens + r.beyond, len(r.prompt)) for r in responses]
            accepted = replay_draft(self.target, draft.eval(), texts, [len(r.tokens) for r in responses])
            self.add(shared, name, responses, accepted)
        self.save()

    def add(self, shared: dict[str, Any], name: str, responses: Sequence[Response], accepted: list[list[int]]) -> None:
        """Rows of one set: all responses, and those that do not repeat themselves."""
        eval_set, _, temperature = name.partition("@")
        calm = [a for a, r in zip(accepted, responses, strict=True) if not repetitive(r.tokens)]
        for label, of_set in ((eval_set, accepted), (f"{eval_set} without repetitive", calm)):
            pooled = [a for one in of_set for a in one]
            self.rows.append({
                **shared, "temperature": float(temperature), "eval_set": label, "prompts": len(of_set),
                "acceptance_length": acceptance_length(pooled), "interval95": bootstrap_interval(of_set, draws=300),
                "acceptance_by_position": acceptance_by_position(pooled, self.k),
            })  # fmt: skip
        first = self.rows[-2]
        self.log(f"{first['trainer']} {first['recipe']} seed {first['seed']} {name}: "
                 f"{first['acceptance_length']:.3f} {[round(x, 2) for x in first['interval95']]} "
                 f"({self.rows[-1]['acceptance_length']:.3f} without repetitive)")  # fmt: skip

    def flops(self, config: DistillConfig) -> float:
        """Model FLOPs of a packed step; anchors see half of a response and their prompt on average."""
        tokens, anchors, block = config.tokens_per_step or 0, config.anchors_per_step, self.sizes.block_size
        before = sum(len(r.prompt) + len(r.tokens) / 2 for r in self.train) / len(self.train)
        pairs = int(anchors * block * (before + block))
        return step_flops(self.sizes, context_rows=tokens, blocks=anchors, attended_pairs=pairs)

    def real(self, draft: DFlashDraft) -> None:
        """The real loop in float32 on a few prompts of each set, beside the replay along its own text."""
        target = TargetModel.load(self.path, self.sizes.target_layer_ids, torch.float32).to(self.scale.device)
        eos = frozenset([self.tokenizer.eos_token_id])
        for name in ("gsm8k@0", "mtbench@0", "gsm8k@1"):
            chosen = self.sets[name][: self.scale.real_prompts]
            temperature = float(name.partition("@")[2])
            options = SamplingOptions(max_tokens=self.scale.max_new_tokens, temperature=temperature)
            generator = torch.Generator(self.scale.device).manual_seed(0)
            accepted = [
                speculative_decode(
                    target, draft, list(r.prompt), options, num_speculative_tokens=self.k, eos_ids=eos,
                    generator=generator,
                ).accepted
                for r in chosen
            ]  # fmt: skip
            shared = {"trainer": "ours", "recipe": "main", "seed": 0, "loop": "real, float32"}
            self.add(shared, name, chosen, accepted)
        self.save()
