"""Running compiled networks as they were written, for a while."""
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_stance: Any = None  # puts back what it found


@contextmanager
def force_eager() -> Iterator[None]:
    """In it, what is compiled runs eagerly: hooks that were registered after the compilation are seen.

    torch's stance is one for the whole process, and each ``set_stance`` restores what it found. Blocks that overlap,
    in threads, would leave it as one of them had it: here the first to enter sets it, the last to leave restores it.
    """
    global _inside, _stance
    with _lock:
        if _inside == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _stance.__exit__(None, None, None)
