"""What a sustained load's tokens a second are counted from."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from benchmarks import pairing_rows
from benchmarks.pairing_rows import ROUNDS, cases


@dataclass
class Engine:
    """Each request gains `gain` tokens a step, which takes as many milliseconds as requests run."""

    gain: int
    left: dict[str, int] = field(default_factory=dict)
    most: int = 0
    added: list[int] = field(default_factory=list)
    now_s: float = 0.0

    def add_request(self, name: str, prompt: dict, length: int) -> None:
        assert name not in self.left
        self.left[name] = length
        self.added.append(length)

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[SimpleNamespace]:
        self.most = max(self.most, len(self.left))
        self.now_s += len(self.left) / 1000
        outputs = []
        for name, length in list(self.left.items()):
            gained = min(self.gain, length)
            self.left[name] -= gained
            if not self.left[name]:
                del self.left[name]
            completion = SimpleNamespace(token_ids=[0] * gained)
            outputs.append(SimpleNamespace(outputs=[completion], finished=name not in self.left))
        return outputs


@pytest.mark.parametrize("concurrency", [2, 5, 32])
def test_a_sustained_rate_is_that_of_full_places(concurrency: int, monkeypatch) -> None:
    engine = Engine(gain=1)
    monkeypatch.setattr(pairing_rows, "delta_params", lambda length: length)
    monkeypatch.setattr(pairing_rows.time, "perf_counter", lambda: engine.now_s)
    llm, arguments = SimpleNamespace(llm_engine=engine), Namespace(shape="tiny")
    rate = pairing_rows._sustained_rate(llm, arguments, "target", concurrency, 64)
    # However long the beginning and the end with fewer requests take.
    assert rate == pytest.approx(1000)
    assert engine.most == concurrency
    assert engine.added[concurrency:] == [64] * (ROUNDS * concurrency)
    assert not engine.left


def test_a_load_is_kept_up_where_another_engine_is_compared_with() -> None:
    found = {
        mode: list(cases(mode, [1, 8, 64], mode != "target")) for mode in ("target", "native", "tcp", "production")
    }
    kept_up = {mode: {(c.concurrency, c.policy) for c in rows if c.load == "sustained"} for mode, rows in found.items()}
    assert kept_up["target"] == {(8, "static"), (64, "static")}
    assert kept_up["native"] == {(8, "static"), (64, "static"), (64, "by batch size")}
    assert kept_up["tcp"] == set()
    assert kept_up["production"] == {(8, "by load"), (64, "by load")}
    # What the engine chooses itself comes before anything that sets it.
    assert [c.policy for c in found["production"][:5]] == ["by load"] * 5
