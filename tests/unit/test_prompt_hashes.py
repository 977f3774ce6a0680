from __future__ import annotations

import random

import numpy as np

from engines.prompt_hashes import PromptHashes
from unmask.pairing.page_hashes import PAGE_SIZE, hash_pages


def test_every_full_page_of_a_prompt_is_named_once() -> None:
    rng = random.Random(0)
    for _ in range(50):
        hashes, tokens = PromptHashes(), [rng.randrange(100) for _ in range(rng.randint(1, 200))]
        cached = rng.randrange(len(tokens))
        hashes.introduce("a", tokens, cached)
        told: list[int] = []
        reached = cached
        while reached < len(tokens):
            count = rng.randint(1, len(tokens) - reached)
            (own,) = hashes.of(["a"], np.array([count]))
            told += own
            reached += count
        assert told == hash_pages(np.array(tokens), PAGE_SIZE)
        # Generated tokens are not known here.
        assert hashes.of(["a", "b"], np.array([40, 40])) == [(), ()]


def test_a_request_that_begins_again_names_all_of_its_pages() -> None:
    hashes, tokens = PromptHashes(), list(range(70))
    hashes.introduce("a", tokens, 0)
    hashes.of(["a"], np.array([40]))
    hashes.introduce("a", [*tokens, *range(30)], 32)
    (told,) = hashes.of(["a"], np.array([68]))
    assert list(told) == hash_pages(np.array([*tokens, *range(30)]), PAGE_SIZE)


def test_a_request_that_has_ended_in_its_prompt_is_forgotten() -> None:
    hashes = PromptHashes()
    hashes.introduce("a", list(range(70)), 0)
    hashes.of(["a"], np.array([40]))
    hashes.forget(["a", "unknown"])
    assert hashes.of(["a"], np.array([30])) == [()]
