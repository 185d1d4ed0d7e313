"""What follows from small integer tensors, remembered by their content, for every layer of a forward asks again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class ContentCache:
    """The last few values by content of what they were made from: every layer of a forward asks for the same one."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._values: OrderedDict[tuple[object, ...], Any] = OrderedDict()

    def get(self, key: tuple[object, ...], build: Callable[[], Any]) -> Any:
        found = self._values.get(key)
        if found is None:
            found = self._values[key] = build()
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        else:
            self._values.move_to_end(key)
        return found


_CACHE = ContentCache()


def content(*tensors: torch.Tensor) -> tuple[object, ...]:
    """Hashable content of small integer tensors."""
    return tuple(part for x in tensors for part in (x.cpu().numpy().tobytes(), x.dtype, x.shape))


def cached(key: tuple[object, ...], build: Callable[[], T]) -> T:
    """``build()``, remembered by ``key``; for validated offsets and layouts."""
    return _CACHE.get(key, build)
