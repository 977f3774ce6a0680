"""What the draft benchmark measures with: target, trajectories, training runs, and rows of results."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.batched_generation import BatchedLlama, Response, repetitive
from benchmarks.draft_prompts import Prompts
from benchmarks.draft_scale import Scale
from benchmarks.draft_step import PEAK_FLOPS
from benchmarks.draft_store import Store
from unmask.config import DistillConfig
from unmask.decoding.speculative import speculative_decode
from unmask.evaluation.metrics import acceptance_by_position, acceptance_length, bootstrap_interval
from unmask.evaluation.replay import replay_confidence, replay_draft
from unmask.models.dflash import DFlashDraft
from unmask.models.draft_start import draft_sizes, new_draft
from unmask.models.target import TargetModel
from unmask.objectives.confidence import ConfidenceHead, error_of
from unmask.targets import resolve_target, unused_special_token
from unmask.training.draft_trainer import DraftTrainer
from unmask.training.feature_cache import FeatureCache
from unmask.training.flops import step_flops
from unmask.training.head import TrainingHead
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.training.training_state import resume_state, save_state
from unmask.types import SamplingOptions

DEVELOPMENT = "development"
FIRST, MORE, FRESH = "train", "more", "fresh@1"
"""Training sets: recipes are chosen by the first, the second is trained on beside it, the third is a second stage's."""
_SAVE_EVERY_S = 60.0


class Deadline(Exception):
    """The call's time is used up; what is done is kept."""


class Benchmark:
    """Target, trajectories and evaluation sets, and the rows measured on them."""

    def __init__(self, scale: Scale, prompts: Path, store: Store, deadline_s: float) -> None:
        self.scale, self.store, self.start = scale, store, time.monotonic()
        self.ends = self.start + deadline_s
        path = resolve_target("embedded:smollm2-135m-instruct")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        dtype = torch.bfloat16 if scale.device == "cuda" else torch.float32
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        model.to(scale.device)  # type: ignore[arg-type]
        self.sizes = draft_sizes(model.config, scale.shape, unused_special_token(self.tokenizer))
        self.target = TargetModel(model, self.sizes.target_layer_ids)
        self.path, self.prompts = path, Prompts(prompts, self.tokenizer, scale.prompt_columns)
        self.k = scale.shape.block_size - 1
        self._features: tuple[str, FeatureCache] | None = None
        self.log("target loaded")

    def log(self, text: str) -> None:
        """One line with the clock."""
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def check_time(self, seconds: float = 0.0) -> None:
        """Raise `Deadline` unless this many seconds are left."""
        if time.monotonic() + seconds > self.ends:
            raise Deadline

    @property
    def train(self) -> list[Response]:
        """The target's responses to training prompts."""
        return [
            response for name in (FIRST, MORE) if name in self.store.names for response in self.store.responses(name)
        ]

    @property
    def sets(self) -> dict[str, list[Response]]:
        """Its responses to held-out prompts, by set and temperature."""
        return {name: self.store.responses(name) for name in self.store.names if name not in (FIRST, MORE, FRESH)}

    def generate(self) -> dict[str, Any]:
        """Evaluation sets first, then the training responses; they go into the store."""
        scale, sampler = self.scale, self._sampler()
        found: dict[str, list[Response]] = {}
        of_prompts = self.prompts
        held_out = {
            "gsm8k": of_prompts.gsm8k(), "mtbench": of_prompts.mtbench(), DEVELOPMENT: of_prompts.development()
        }  # fmt: skip
        chosen = [(name, prompt) for name, prompts in held_out.items() for prompt in prompts[: scale.eval_prompts]]
        for temperature in (0.0, 1.0):
            answers = self._answers(sampler, [prompt for _, prompt in chosen], temperature)
            for (name, _), answer in zip(chosen, answers, strict=True):
                found.setdefault(f"{name}@{temperature:g}", []).append(answer)
        for name, responses in found.items():
            self.log(f"{name}: {len(responses)} prompts, {sum(repetitive(r.tokens) for r in responses)} repetitive")
        start = time.monotonic()
        questions, broad = (p[: scale.train_prompts] for p in (self.prompts.questions(), self.prompts.broad()))
        own = self.prompts.written(scale.own_prompts, sampler)
        plain = [*questions, *broad, *own]
        drawn = [*questions, *broad * scale.broad_repeats, *own]
        found[FIRST] = self._answers(sampler, plain, 0.0) + self._answers(sampler, drawn, 1.0)
        return self._keep(found, FIRST, len(own), time.monotonic() - start)

    def generate_more(self) -> dict[str, Any]:
        """More prompts that the target writes itself, and its responses to them: the given ones are word problems."""
        sampler, start = self._sampler(), time.monotonic()
        known = {r.prompt for r in self.store.responses(FIRST)}
        own = [p for p in self.prompts.written(self.scale.more_prompts, sampler) if tuple(p) not in known]
        found = {MORE: self._answers(sampler, own, 0.0) + self._answers(sampler, own, 1.0)}
        return self._keep(found, MORE, len(own), time.monotonic() - start)

    def generate_again(self) -> dict[str, Any]:
        """One more response to every prompt of the first training set, at temperature 1."""
        start = time.monotonic()
        prompts = [list(prompt) for prompt in dict.fromkeys(r.prompt for r in self.store.responses(FIRST))]
        return self._keep({FRESH: self._answers(self._sampler(), prompts, 1.0)}, FRESH, 0, time.monotonic() - start)

    def _keep(self, found: dict[str, list[Response]], name: str, own: int, seconds: float) -> dict[str, Any]:
        tokens = sum(len(r.tokens) for r in found[name])
        self.log(f"{own} prompts of its own; {len(found[name])} responses, {tokens} tokens in {seconds:.1f} s")
        self.store.keep_responses(found)
        return {"own prompts": own, "responses": len(found[name]), "tokens": tokens, "seconds": seconds}

    def _sampler(self) -> BatchedLlama:
        scale = self.scale
        return BatchedLlama(
            self.target.model, rows=scale.rows, prompt_columns=scale.prompt_columns,
            max_new_tokens=scale.max_new_tokens, beyond=self.k, eos_id=self.tokenizer.eos_token_id,
        )  # fmt: skip

    def _answers(self, sampler: BatchedLlama, prompts: Sequence[list[int]], temperature: float) -> list[Response]:
        rows = self.scale.rows
        batches = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
        return [response for batch in batches for response in sampler.generate(batch, temperature)]

    def features(self, *, to_choose: bool = False, every: int = 1) -> FeatureCache:
        """Of every n-th training text, or of half of those by which recipes are chosen."""
        chosen = self.store.responses(FIRST)[::2] if to_choose else self.train[::every]
        return self.features_of(
            f"{'to choose' if to_choose else 'training set'}, every {every}",
            lambda: [TokenSequence(r.prompt + r.tokens, len(r.prompt)) for r in chosen],
        )

    def features_of(self, name: str, texts: Callable[[], Sequence[TokenSequence]]) -> FeatureCache:
        """Of texts, packed; those asked for last are kept. Features are kept up to the recipe's bound and recomputed
        beyond it."""
        if self._features is not None and self._features[0] == name:
            return self._features[1]
        self._features = None  # makes room
        config, device = self.scale.config, self.scale.device
        sequences = SequenceSet(texts(), batch_size=1, seed=config.seed, tokens_per_step=config.tokens_per_step)
        cache = FeatureCache(
            self.target, sequences, int(config.feature_cache_gb * 1e9), 65536 if device == "cuda" else 4096,
            final=True, device=device if config.feature_cache_device == "training" else "cpu",
        )  # fmt: skip
        start = time.monotonic()
        kept = cache.warm_up()
        self.log(f"features of {kept}/{len(sequences)} sequences kept, {cache.bytes / 1e9:.1f} GB "
                 f"in {time.monotonic() - start:.1f} s")  # fmt: skip
        self._features = name, cache
        return cache

    def forget_features(self) -> None:
        """Make room for an engine of another process."""
        self._features = None
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Give back what a finished case holds: recorded steps refer to themselves, compiled ones to their modules."""
        torch._dynamo.reset()
        gc.collect()
        if self.scale.device == "cuda":
            torch.cuda.empty_cache()

    def new_draft(self, seed: int, init: str = "target") -> DFlashDraft:
        """A fresh draft."""
        return new_draft(self.sizes, self.target.model, init, seed).to(self.scale.device)

    def trainer(
        self,
        config: DistillConfig,
        features: FeatureCache,
        draft: DFlashDraft,
        confidence: ConfidenceHead | None = None,
    ) -> DraftTrainer:
        """A trainer of a draft; its seed decides the order of the texts too."""
        features.sequences.reorder(config.seed)
        head = TrainingHead(self.target.lm_head, [], config.head_negatives)
        return DraftTrainer(draft.train().requires_grad_(True), features, head, config, confidence=confidence)

    def run(
        self, trainer: Any, *, seconds: float | None = None, steps: int | None = None, state: Path | None = None
    ) -> dict[str, float]:
        """Train to a budget. The first ten steps of the process compile, for as long as the host happens to take: they
        count neither for the speed nor for a budget of seconds, but for what the training took.

        Args:
            state: keep the training's state there, and go on from it. Without one the deadline ends the run for good.

        Raises:
            Deadline: the call's time is used up.
        """
        meta = (resume_state(state, trainer) if state else None) or {"seconds": 0.0, "compiling": 0.0}
        if (finished := meta.get("finished")) is not None:
            return finished
        used, compiling, last = meta["seconds"], meta["compiling"], time.monotonic()
        start, saved, first, warm = last, last, trainer.steps_done, last
        progress, metrics = self._progress(trainer, used, seconds, steps), {"loss": float("nan")}
        while progress < 1:
            metrics = trainer.step(progress)
            done = trainer.steps_done - first
            if done == 10 or done % 20 == 0:
                self._synchronise()
            now = time.monotonic()
            if done > 10:
                used, last = used + now - last, now
            else:
                compiling, last, warm = compiling + now - last, now, now
            progress = self._progress(trainer, used, seconds, steps)
            if state and (now - saved > _SAVE_EVERY_S or now > self.ends):
                save_state(state, trainer, {"seconds": used, "compiling": compiling}, keep=1)
                saved = last = time.monotonic()
            self.check_time()
            if done % 200 == 0:
                self.log(f"step {trainer.steps_done} loss {float(metrics['loss']):.3f}")
        self._synchronise()
        done = trainer.steps_done - first
        taken = (time.monotonic() - warm) / (done - 10) if done > 10 else (time.monotonic() - start) / max(done, 1)
        self.log(f"{trainer.steps_done} steps, {1000 * taken:.1f} ms a step, {compiling:.0f} s of compiling, "
                 f"loss {float(metrics['loss']):.3f}")  # fmt: skip
        figures = {
            "steps": trainer.steps_done, "step_seconds": taken, "seconds": used + compiling, "compiling": compiling,
            "loss": float(metrics["loss"]),
        }  # fmt: skip
        if state:
            save_state(state, trainer, {"seconds": used, "compiling": compiling, "finished": figures}, keep=1)
        return figures

    def _progress(self, trainer: Any, used: float, seconds: float | None, steps: int | None) -> float:
        return trainer.steps_done / steps if steps else used / (seconds or 1.0)

    def _synchronise(self) -> None:
        if self.scale.device == "cuda":
            torch.cuda.synchronize()

    def measure(
        self, draft: DFlashDraft, trainer: str, recipe: str, config: DistillConfig, run: dict[str, float],
        *, to_choose: bool = False, confidence: ConfidenceHead | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Replay a draft on the test sets, or on those by which recipes are chosen; one row a set, and one without
        repetitive responses. With a confidence head, on the sets of its temperature, and how far off it is."""
        per_step = config.tokens_per_step or 0
        sequences = len(self.train) / max(sum(len(r.prompt) + len(r.tokens) for r in self.train) / per_step, 1)
        shared = {
            "trainer": trainer, "recipe": recipe, "seed": config.seed, "gpu_minutes": run["seconds"] / 60,
            "tokens_seen": int(run["steps"] * per_step), "samples_per_second": sequences / run["step_seconds"],
            "mfu": self.flops(config) / PEAK_FLOPS / run["step_seconds"], "loop": "replay",
            "steps": int(run["steps"]), "step_ms": 1000 * run["step_seconds"], "loss": run["loss"],
        }  # fmt: skip
        rows = []
        chosen = {name: r for name, r in self.sets.items() if name.startswith(DEVELOPMENT) == to_choose}
        if confidence is not None:
            chosen = {name: r for name, r in chosen.items() if float(name.partition("@")[2]) == confidence.temperature}
        if not chosen:
            raise ValueError("the state folder is of another version of this script; begin with a new one")
        for name, responses in chosen.items():
            texts = [TokenSequence(r.prompt + r.tokens + r.beyond, len(r.prompt)) for r in responses]
            lengths = [len(r.tokens) for r in responses]
            accepted = replay_draft(self.target, draft.eval(), texts, lengths)
            rows += self.rows(shared, name, responses, accepted)
            if confidence is not None:
                judged = replay_confidence(self.target, draft, confidence, texts, lengths)
                rows[-2] |= {"confidence_error": error_of(judged), "judged_rows": len(judged)}
                self.log(f"confidence is off by {rows[-2]['confidence_error']:.4f} over {len(judged)} rows")
        return rows

    def rows(
        self, shared: dict[str, Any], name: str, responses: Sequence[Response], accepted: list[list[int]]
    ) -> list[dict[str, Any]]:
        """Rows of one set: all responses, and those that do not repeat themselves."""
        eval_set, _, temperature = name.partition("@")
        calm = [a for a, r in zip(accepted, responses, strict=True) if not repetitive(r.tokens)]
        rows = []
        for label, of_set in ((eval_set, accepted), (f"{eval_set} without repetitive", calm)):
            pooled = [a for one in of_set for a in one]
            rows.append({
                **shared, "temperature": float(temperature), "eval_set": label, "prompts": len(of_set),
                "acceptance_length": acceptance_length(pooled) if pooled else None,
                "interval95": bootstrap_interval(of_set, draws=300),
                "acceptance_by_position": acceptance_by_position(pooled, self.k),
            })  # fmt: skip
        self.log(f"{shared['trainer']} {shared['recipe']} seed {shared['seed']} {name}: "
                 f"{rows[0]['acceptance_length']} {[round(x, 2) for x in rows[0]['interval95']]} "
                 f"({rows[1]['acceptance_length']} without repetitive)")  # fmt: skip
        return rows

    def flops(self, config: DistillConfig) -> float:
        """Model FLOPs of a packed step; anchors see half of a response and their prompt on average."""
        tokens, anchors, block = config.tokens_per_step or 0, config.anchors_per_step, self.sizes.block_size
        before = sum(len(r.prompt) + len(r.tokens) / 2 for r in self.train) / len(self.train)
        pairs = int(anchors * block * (before + block))
        return step_flops(self.sizes, context_rows=tokens, blocks=anchors, attended_pairs=pairs)

    def real(self, draft: DFlashDraft, shared: dict[str, Any]) -> list[dict[str, Any]]:
        """The real loop in float32 on a few prompts of each set, beside the replay along its own text."""
        target = TargetModel.load(self.path, self.sizes.target_layer_ids, torch.float32).to(self.scale.device)
        eos = frozenset([self.tokenizer.eos_token_id])
        rows = []
        for name in ("gsm8k@0", "mtbench@0", "gsm8k@1"):
            chosen = self.sets[name][: self.scale.real_prompts]
            options = SamplingOptions(max_tokens=self.scale.max_new_tokens, temperature=float(name.partition("@")[2]))
            generator = torch.Generator(self.scale.device).manual_seed(0)
            results = [
                speculative_decode(
                    target, draft, list(r.prompt), options, num_speculative_tokens=self.k, eos_ids=eos,
                    generator=generator,
                )
                for r in chosen
            ]  # fmt: skip
            told = [Response(r.prompt, tuple(x.token_ids), ()) for r, x in zip(chosen, results, strict=True)]
            rows += self.rows(shared | {"loop": "real, float32"}, name, told, [x.accepted for x in results])
        return rows
