"""The networks that `diffusion_quality.py` compares, trained one after another on one GPU, each a checkpoint directory.

fine_tuned   the causal LM, fine-tuned on the task: APD's verifier, and the baseline
teacher      `fine_tuned` adapted to masked diffusion (bidirectional)
dparallel    `teacher` after certainty forcing on its own right answers
d2f          `teacher` after discrete forcing (block-causal)
dparallel_d2f  `dparallel` after discrete forcing
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from unmask.config import AdaptConfig, StudentConfig
from unmask.decoding.engine import DiffusionEngine, EngineConfig
from unmask.decoding.registry import build_decoder
from unmask.decoding.request import Completion, DecodeRequest
from unmask.models import adapted, families
from unmask.models.transformer import DiffusionLM
from unmask.training.adaptation import AdaptationTrainer
from unmask.training.budget import Budget
from unmask.training.certainty import CertaintyForcingTrainer
from unmask.training.diffusion_batch import fitting
from unmask.training.diffusion_trainer import DiffusionTrainer
from unmask.training.forcing import DiscreteForcingTrainer
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.types import SamplingOptions
from unmask.word_problems import word_problem_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is trained: the published figures, or sizes that prove the script on a CPU."""

    rows: int
    trajectories: int
    response_length: int
    batch: int
    seconds: dict[str, float]
    device: str
    keep_wrong: bool = False
    """Train on wrong answers too: a network that has hardly been trained gives no others."""

    @property
    def dtype(self) -> torch.dtype:
        """Of decoding."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


class Task:
    """Word problems as token sequences."""

    def __init__(self, tokenizer: Any, response_length: int) -> None:
        self.tokenizer, self.response_length = tokenizer, response_length
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": "\0"}], add_generation_prompt=True, tokenize=False
        )
        self.prefix, _, self.suffix = rendered.partition("\0")

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Chat prompts as ids."""
        rendered = [f"{self.prefix}{text}{self.suffix}" for text in texts]
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def sequences(self, rows: Sequence[dict[str, str]]) -> list[TokenSequence]:
        """Prompt and written response of each row."""
        prompts = self.prompts([row["prompt"] for row in rows])
        responses = self.tokenizer([row["response"] for row in rows], add_special_tokens=False)["input_ids"]
        return [TokenSequence((*p, *r), len(p)) for p, r in zip(prompts, responses, strict=True)]

    def is_right(self, row: dict[str, str], response_ids: list[int]) -> bool:
        """Whether the response ends in the row's answer."""
        text = self.tokenizer.decode(response_ids, skip_special_tokens=True).strip()
        return text.endswith(f" {row['answer']}.")


class Workshop:
    """Trains what is not there yet; a directory that exists is loaded."""

    def __init__(self, base: Path, work: Path, task: Task, scale: Scale) -> None:
        self.base, self.work, self.task, self.scale = base, work, task, scale
        path = work / "log.json"
        self.log: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def fine_tuned(self) -> DiffusionLM:
        """The causal LM on the task's written answers."""

        def train() -> DiffusionLM:
            network = adapted.load(self.base, dtype=torch.float32, device=self.scale.device)
            config = AdaptConfig(attention="causal", learning_rate=3e-4, **self._common("fine_tuned", self.scale.batch))
            return self._train("fine_tuned", AdaptationTrainer, network, self._written(), config)

        return self._made("fine_tuned", train)

    def teacher(self) -> DiffusionLM:
        """The masked-diffusion LM."""

        def train() -> DiffusionLM:
            network = self.fine_tuned().float()
            config = AdaptConfig(
                learning_rate=5e-4, annealing_steps=100, ema=0.995, **self._common("teacher", self.scale.batch)
            )
            network = adapted.adapt(network, mask_id=mask_token(self.task.tokenizer))
            return self._train("teacher", AdaptationTrainer, network, self._written(), config)

        return self._made("teacher", train)

    def dparallel(self) -> DiffusionLM:
        """The teacher after certainty forcing."""

        def train() -> DiffusionLM:
            config = StudentConfig(
                block_size=16,
                learning_rate=1e-4,
                ema=0.99,
                mask_ratio_top=1.0,
                text_segments=True,
                **self._common("dparallel", self.scale.batch // 2),
            )
            network = self.teacher().float()
            return self._train("dparallel", CertaintyForcingTrainer, network, self._own("teacher"), config)

        return self._made("dparallel", train)

    def d2f(self, source: str = "teacher") -> DiffusionLM:
        """A network after discrete forcing."""
        name = "d2f" if source == "teacher" else f"{source}_d2f"

        def train() -> DiffusionLM:
            config = StudentConfig(
                objective="d2f",
                block_size=16,
                learning_rate=2e-4,
                ema=0.99,
                noise_top=1.0,
                certainty=0.0 if source == "teacher" else 1.0,
                **self._common(name, self.scale.batch),
            )
            network = families.load(self.work / source, dtype=torch.float32, device=self.scale.device)
            return self._train(name, DiscreteForcingTrainer, network, self._own("teacher"), config)

        return self._made(name, train)

    def _common(self, name: str, batch: int) -> dict[str, Any]:
        on_gpu = self.scale.device == "cuda"
        return {
            "max_seconds": self.scale.seconds[name],
            "sequences_per_step": batch,
            "response_length": self.scale.response_length,
            "precision": "bfloat16" if on_gpu else "float32",
            "compile": on_gpu,
        }

    def _made(self, name: str, train: Any) -> DiffusionLM:
        path = self.work / name
        if not (path / "config.json").is_file():
            network = train()
            families.save(network.to(torch.bfloat16), path)
            self.task.tokenizer.save_pretrained(path)
            del network
            torch.cuda.empty_cache()
        return families.load(path, dtype=self.scale.dtype, device=self.scale.device)

    def _train(
        self, name: str, cls: type[DiffusionTrainer], network: DiffusionLM, texts: list[TokenSequence], config: Any
    ) -> DiffusionLM:
        eos = network.eos_ids[0]
        kept = fitting(texts, config.response_length, eos)
        sequences = SequenceSet(kept, batch_size=config.sequences_per_step, seed=0)
        trainer = cls(network, sequences, config, response_length=config.response_length)
        budget, start, reports = Budget(None, config.max_seconds), time.monotonic(), []
        trainer.step(0.0)  # compilation is not part of the budget
        compiled = time.monotonic()
        while budget.progress(trainer.steps_done) < 1:
            reports.append(trainer.step(budget.progress(trainer.steps_done)))
            budget.seconds_used = time.monotonic() - compiled
        recent = reports[-20:]
        self.log[name] = {
            "steps": trainer.steps_done,
            "sequences": trainer.steps_done * config.sequences_per_step,
            "seconds": budget.seconds_used,
            "compile_seconds": compiled - start,
            **{key: sum(r[key] for r in recent) / len(recent) for key in recent[0]},
        }
        print(f"[{name}] {json.dumps({k: round(v, 4) for k, v in self.log[name].items()})}", flush=True)
        self._keep_log()
        return trainer.published()

    def _keep_log(self) -> None:
        """A later call goes on with these networks, and publishes how they were made."""
        (self.work / "log.json").write_text(json.dumps(self.log, indent=1) + "\n")

    def _written(self) -> list[TokenSequence]:
        path = self.work / "written.safetensors"
        if not path.is_file():
            rows = list(itertools.islice(word_problem_rows("train"), self.scale.rows))
            save_texts(self.task.sequences(rows), path)
        return load_texts(path)

    def _own(self, source: str) -> list[TokenSequence]:
        """Trajectories: the right answers of a network to training prompts that its own training did not visit."""
        path = self.work / "trajectories.safetensors"
        if not path.is_file():
            rows = list(itertools.islice(word_problem_rows("train", seed=1), self.scale.trajectories))
            network = families.load(self.work / source, dtype=self.scale.dtype, device=self.scale.device)
            start = time.monotonic()
            settings = {"name": "threshold", "threshold": 0.95, "block_size": 16, "cache": "dual"}
            prompts = self.task.prompts([row["prompt"] for row in rows])
            done = decode(network, settings, prompts, self.scale, max_rows=512)
            right = [
                (row, c)
                for row, c in zip(rows, done, strict=True)
                if self.scale.keep_wrong or self.task.is_right(row, c.response_ids)
            ]
            prompts = self.task.prompts([row["prompt"] for row, _ in right])
            kept = [TokenSequence((*p, *c.response_ids), len(p)) for p, (_, c) in zip(prompts, right, strict=True)]
            self.log["trajectories"] = {
                "rows": len(rows), "right": len(kept), "seconds": time.monotonic() - start, "decoder": settings,
                "nfe": sum(c.num_forwards for c in done) / len(done),
            }  # fmt: skip
            print(f"[trajectories] {self.log['trajectories']}", flush=True)
            self._keep_log()
            save_texts(kept, path)
        return load_texts(path)


def save_texts(texts: Sequence[TokenSequence], path: Path) -> None:
    """Sequences as three flat tensors."""
    tensors = {
        "ids": torch.tensor([token for text in texts for token in text.ids], dtype=torch.int32),
        "lengths": torch.tensor([len(text.ids) for text in texts], dtype=torch.int32),
        "prompt_lengths": torch.tensor([text.prompt_length for text in texts], dtype=torch.int32),
    }
    save_file(tensors, path)


def load_texts(path: Path) -> list[TokenSequence]:
    """What `save_texts` wrote."""
    tensors = load_file(path)
    ids = tensors["ids"].split(tensors["lengths"].tolist())
    lengths = tensors["prompt_lengths"].tolist()
    return [TokenSequence(tuple(part.tolist()), length) for part, length in zip(ids, lengths, strict=True)]


def mask_token(tokenizer: Any) -> int:
    """An unused special id: SmolLM2 keeps some for repository data."""
    return tokenizer.convert_tokens_to_ids("<reponame>")


def decode(
    network: DiffusionLM,
    settings: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    scale: Scale,
    *,
    verifier: DiffusionLM | None = None,
    max_rows: int = 256,
) -> list[Completion]:
    """Decode prompts with continuous batching; completions in the order of the prompts."""
    requests = requests_of(prompts, scale)
    decoder = build_decoder(settings, network, verifier=verifier)
    engine = DiffusionEngine(decoder.cached_models, engine_config(requests, max_rows))
    done = {c.request_id: c for c in engine.run(requests, decoder)}
    return [done[request.request_id] for request in requests]


def requests_of(prompts: Sequence[Sequence[int]], scale: Scale) -> list[DecodeRequest]:
    """One greedy request a prompt, all of the same response length."""
    options = SamplingOptions(max_tokens=scale.response_length)
    return [DecodeRequest(request_id=str(i), prompt_ids=tuple(ids), options=options) for i, ids in enumerate(prompts)]


def engine_config(requests: Sequence[DecodeRequest], max_rows: int, graphs: bool = False) -> EngineConfig:
    """Bounds that let all rows of these requests run in one forward."""
    longest = -(-max(request.length for request in requests) // 16) * 16
    return EngineConfig(
        max_rows=max_rows,
        max_length=longest,
        max_fed_columns=max_rows * longest,
        max_logits_mb=4096,
        cuda_graphs=graphs,
    )
