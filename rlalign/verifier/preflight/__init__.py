"""Two configurations compared before a GPU is rented: what in them will make log-probs differ."""

from rlalign.verifier.preflight.formats import read_sides, with_requests
from rlalign.verifier.preflight.rules import check, not_stated
from rlalign.verifier.preflight.side import Finding, Side

__all__ = ["Finding", "Side", "check", "not_stated", "read_sides", "with_requests"]
