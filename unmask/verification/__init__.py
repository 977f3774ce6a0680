"""Whether a response is right: what training on verified trajectories and evaluation share."""

from unmask.verification.judge import Judge
from unmask.verification.verifier import Verifier, build_verifier

__all__ = ["Judge", "Verifier", "build_verifier"]
