"""Dumps of any engine: token ids and the log-probs it reported, read as a stream of one record type."""

from rlalign.verifier.dumps.record import DumpSequence

__all__ = ["DumpSequence"]
