"""Programs of others, unmodified, against the running service. They are installed apart: their requirements are many.

`python -m venv V && V/bin/pip install "lm-eval[api]" guidellm`, and V/bin on the PATH.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from unmask.config import EMBEDDED_TARGET
from unmask.targets import resolve_target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TASK = """
task: arithmetic_words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}} Answer: it is"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(6)]


def run(*command: str, cwd: Path) -> str:
    """What a command of another package prints; it must be on the PATH."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    return output


@pytest.mark.parametrize("model", ["local-chat-completions", "local-completions"])
def test_the_evaluation_harness(service, tmp_path: Path, model: str):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "task.yaml").write_text(TASK.replace("DATA", str(data)))
    chats = model == "local-chat-completions"
    arguments = {
        "model": "unmask",
        "base_url": f"{service.url}/v1/{'chat/' if chats else ''}completions",
        "num_concurrent": "2",
        "max_retries": "1",
        "tokenized_requests": "False",
        "tokenizer_backend": "None" if chats else "huggingface",
        **({} if chats else {"tokenizer": str(resolve_target(EMBEDDED_TARGET))}),
    }
    run(
        "lm_eval",
        f"--model={model}",
        "--model_args=" + ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks=arithmetic_words",
        f"--include_path={tmp_path}",
        "--output_path=out",
        "--log_samples",
        *(["--apply_chat_template"] if chats else []),
        cwd=tmp_path,
    )
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == len(QUESTIONS)
    assert all(answers)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_load_generator(service, tmp_path: Path, path: str, stream: bool):
    backend = {"kind": "openai_http", "target": service.url, "request_format": path, "stream": stream}
    tokenizer = str(resolve_target(EMBEDDED_TARGET))
    run(
        "guidellm",
        "run",
        f"--backend={json.dumps(backend)}",
        '--profile={"kind": "concurrent", "streams": [2]}',
        '--constraint={"kind": "max_requests", "count": 8}',
        '--data={"kind": "synthetic_text", "prompt_tokens": 24, "output_tokens": 12}',
        f"--tokenizer={json.dumps({'kind': 'hf_auto', 'model': tokenizer})}",
        '--output={"kind": "json", "path": "report.json"}',
        "--disable-console",
        cwd=tmp_path,
    )
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    counts: dict[str, Any] = benchmark["metrics"]["request_totals"]
    assert counts["errored"] == 0
    # The generator leaves the last requests of a run unfinished.
    assert counts["successful"] >= 6
