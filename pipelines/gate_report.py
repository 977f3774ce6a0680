"""What the gate found, and whether that will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.cluster import FaultError
from unmask.errors import UserError
from unmask.evaluation.diagnosis import TOLERANCE, Evaluated, Served
from unmask.evaluation.metrics import acceptance_length

RETURN_S = 240.0
"""In which a killed draft must be back: Serve starts its replica anew, which loads the target's vocabulary again."""
UNDRAFTED = 0.1
"""Share of steps that may go without a proposal: a service may skip one, but not live without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What the served pairing did. `acceptance_length_evaluated` is the plain loop's on the same prompts."""

    requests: int
    identical: int
    acceptance_length: float
    acceptance_length_evaluated: float
    tokens_per_second: float
    target_pid: int = 0
    draft_pid: int = 0
    draft_killed_requests: int = 0
    draft_killed_identical: int = 0
    draft_returned: bool = True
    """Whether the draft that was killed was used again."""
    undrafted: float = 0.0
    """Share of the steps that could have had a proposal and had none."""
    exact: bool = True
    """Whether text must be identical: rounding decides near ties in another precision than float32."""
    cause: str = ""
    """Likely cause of another acceptance length or of other prompts than evaluated; empty where there are none."""


def check(report: GateReport) -> None:
    """Refuse the roll-out of a pairing that does not serve what was evaluated.

    Raises:
        UserError: it serves another acceptance length, or other text.
        FaultError: its draft is too slow for the target, or did not come back when it was killed.
    """
    if report.cause:
        raise UserError(
            f"served {report.acceptance_length:.3f}, evaluated {report.acceptance_length_evaluated:.3f} "
            f"({difference(report):.1%} apart, {TOLERANCE:.0%} allowed); likely cause: {report.cause}",
            field="gate.acceptance_length",
        )
    differing = report.requests - report.identical + report.draft_killed_requests - report.draft_killed_identical
    if report.exact and differing:
        raise UserError(
            f"served text differs from the target's own in {report.requests - report.identical} of {report.requests} "
            f"requests, {report.draft_killed_requests - report.draft_killed_identical} with the draft killed; "
            "is the target another one?",
            field="gate.identical",
        )
    if report.undrafted > UNDRAFTED:
        raise FaultError(
            f"the draft proposed nothing in {report.undrafted:.0%} of the steps ({UNDRAFTED:.0%} allowed): it answers "
            "later than serve.draft_timeout_ms, or not at all; its log says which"
        )
    if not report.draft_returned:
        raise FaultError(f"the draft was killed and not used again within {RETURN_S:g} s; its replica's log says why")


def difference(report: GateReport) -> float:
    """Of the two acceptance lengths, relative."""
    return abs(report.acceptance_length / report.acceptance_length_evaluated - 1)


def acceptance_lengths(evaluated: Sequence[Evaluated], served: Sequence[Served]) -> tuple[float, float]:
    """Acceptance lengths as served and as evaluated, of new prompts or of cached ones, whichever differ more."""
    wanted_of = {tuple(one.prompt_ids): one.accepted for one in evaluated}
    pairs = []
    for cached in (False, True):
        known = [one for one in served if bool(one.cached_tokens) == cached and tuple(one.prompt_ids) in wanted_of]
        if known:
            accepted = acceptance_length([count for one in known for count in one.accepted])
            wanted = acceptance_length([count for one in known for count in wanted_of[tuple(one.prompt_ids)]])
            pairs.append((accepted, wanted))
    if not pairs:
        # All were served as other prompts than evaluated.
        accepted = acceptance_length([count for one in served for count in one.accepted])
        pairs.append((accepted, acceptance_length([count for one in evaluated for count in one.accepted])))
    return max(pairs, key=lambda pair: abs(pair[0] / pair[1] - 1))
