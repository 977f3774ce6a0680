from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from serve_app.detokenizer import Detokenizer, StopStrings
from tests.unit.serve_app.conftest import TEXTS, byte_tokenizer

TOKENIZER = byte_tokenizer().backend_tokenizer


def pieces(ids: Sequence[int], tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(st.text())
def test_pieces_add_up_to_the_text_and_hold_no_broken_character(text: str):
    text = text.replace("\ufffd", "")
    got = pieces(TOKENIZER.encode(text, add_special_tokens=False).ids)
    assert "".join(got) == text
    assert not any("\ufffd" in piece for piece in got)


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_any_tokens_add_up_to_the_decoding_of_all(ids: list[int]):
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids)


def test_an_incomplete_character_is_held_back_and_given_out_broken_at_the_end():
    ids = TOKENIZER.encode("a\U0001f389", add_special_tokens=False).ids
    assert pieces(ids[:-1]) == ["a", "", "", "", "\ufffd"]


def test_leading_spaces_survive_where_decoders_strip_the_first_one():
    words = ["\u2581one", "\u2581two", "\u2581three"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([1]) == "two"
    assert pieces([0, 1, 2], tokenizer) == ["one", " two", " three", ""]


def stopped(parts: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    """What goes out of `StopStrings`, fed part by part."""
    cutter, text = StopStrings(stops), ""
    for part in parts:
        text += cutter.push(part)
        if cutter.matched:
            return text, True
    return text + cutter.finish(), False


def first_stop(text: str, stops: Sequence[str]) -> str:
    """Reference: the text before the stop string that is complete first, at its earliest beginning."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string(parts: list[str], stops: list[str]):
    characters = list("".join(parts))
    assert stopped(characters, stops)[0] == first_stop("".join(parts), stops)


@given(st.integers(0, len(TEXTS) - 1), st.integers(1, 5))
def test_nothing_of_a_stop_string_is_ever_given_out(which: int, width: int):
    text, stop = TEXTS[which], TEXTS[which][10:14]
    parts = [text[i : i + width] for i in range(0, len(text), width)]
    out, matched = stopped(parts, [stop])
    assert matched
    assert out == text[: text.index(stop)]


@pytest.mark.parametrize(("text", "given_out"), [("ab", ""), ("abc", "abc"), ("xa", "x")])
def test_only_a_possible_beginning_is_held_back(text: str, given_out: str):
    cutter = StopStrings(["abd"])
    assert cutter.push(text) == given_out
    assert cutter.finish() == text.removeprefix(given_out)
