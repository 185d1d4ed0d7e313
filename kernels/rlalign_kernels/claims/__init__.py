"""What must hold of every operator's bits, declared once, for any shapes and any backend.

Invariance: a row (a sequence) alone is the row among others, whatever those hold; attention in chunks, on pages and
token by token is attention in one piece; every schedule of the tables gives the chosen one's bits. Gradients: the same
batch twice gives the same bits. ``subjects`` of a file are what ``rlalign_kernels.conformance.examine`` takes.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlalign_kernels.claims import attention, elementwise, linear, vocab
from rlalign_kernels.claims.shapes import LARGE, SMALL, AttentionShape, Setting, Shapes, setting
from rlalign_kernels.conformance import Subject

__all__ = ["LARGE", "SMALL", "AttentionShape", "Setting", "Shapes", "all_subjects", "setting"]


def all_subjects(shapes: Shapes, setting: Setting) -> Iterator[Subject]:
    """Every operator, one subject per shape."""
    for file in (linear, attention, vocab, elementwise):
        yield from file.subjects(shapes, setting)
