"""A draft that costs nothing: prompt lookup, else a table of n-grams of the training responses.

The baseline that a trained draft has to beat. Acceptance is replayed along the target's own greedy response,
which is what a verified loop would emit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from unmask.decoding.speculative import longest_match

Ngram = tuple[int, ...]


class NgramProposer:
    """Proposes what followed the longest recent match in the request, else the most frequent continuation seen.

    Args:
        responses: training responses from which the table is counted.
        max_order: longest suffix looked up (the table maps suffixes of up to `max_order - 1` tokens to the next).
    """

    def __init__(self, responses: Iterable[Sequence[int]], max_order: int = 4) -> None:
        self.max_suffix = max_order - 1
        counts: dict[Ngram, Counter[int]] = defaultdict(Counter)
        for response in responses:
            for end in range(1, len(response)):
                for length in range(1, min(self.max_suffix, end) + 1):
                    counts[tuple(response[end - length : end])][response[end]] += 1
        self.table = {suffix: counter.most_common(1)[0][0] for suffix, counter in counts.items()}

    def propose(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Up to `num_tokens` tokens after `ids`; an empty list when nothing matches."""
        return self.lookup(ids, num_tokens) or self.chain(ids, num_tokens)

    def lookup(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Continuation of the latest earlier occurrence of the longest suffix of two tokens or more.

        A match that overlaps the end goes on with what it has proposed, so that repetition is followed.
        """
        for length in range(self.max_suffix, 1, -1):
            suffix = list(ids[-length:])
            for start in range(len(ids) - length - 1, -1, -1):
                if list(ids[start : start + length]) == suffix:
                    text = list(ids)
                    for offset in range(num_tokens):
                        text.append(text[start + length + offset])
                    return text[len(ids) :]
        return []

    def chain(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy walk through the table, backing off to shorter suffixes."""
        context = list(ids[-self.max_suffix :])
        proposal: list[int] = []
        while len(proposal) < num_tokens:
            token = next((self.table[s] for s in _suffixes(context, self.max_suffix) if s in self.table), None)
            if token is None:
                break
            proposal.append(token)
            context.append(token)
        return proposal


def replay(
    proposer: NgramProposer, prompt: Sequence[int], continued: Sequence[int], num_tokens: int, *, until: int
) -> list[int]:
    """Accepted drafts of each verification of a response whose text is known.

    Args:
        continued: the target's greedy response and at least `num_tokens` tokens of what it would say next, so that
            the last verification counts like one in a served pairing.
        until: length of the response itself.
    """
    accepted: list[int] = []
    done = 1  # The first token comes from the prefill and takes no verification.
    while done < until:
        proposal = proposer.propose([*prompt, *continued[:done]], num_tokens)
        accepted.append(longest_match(proposal, list(continued[done : done + num_tokens])))
        done += accepted[-1] + 1
    return accepted


def _suffixes(context: Sequence[int], longest: int) -> Iterable[Ngram]:
    return (tuple(context[-length:]) for length in range(min(longest, len(context)), 0, -1))
