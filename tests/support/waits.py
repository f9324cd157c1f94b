"""Counts what would make a host wait for its GPU, without a GPU: reads of a tensor's value, results whose
size depends on values, and copies of the host's numbers to the device.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that bring a value to the host, or whose result has a size that only the device knows.
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
# Calls that do so below the operators, or bring numbers of the host to the device.
CALLS = {"tolist", "numpy", "cpu", "__array__", "tensor", "as_tensor", "from_numpy"}
PLACES = ("llava_ext", "transformers", "accelerate", "deepspeed", "torch/optim", "torch/nn", "peft")


class _Operators(TorchDispatchMode):
    def __init__(self, note: Any) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in READS or (name.startswith("index") and _has_mask(args)):
            self.note(name)
        return function(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    """Whether an operator takes elements by a mask, whose number is only known when it is counted."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(torch.is_tensor(item) and item.dtype == torch.bool for item in indices)


class _Calls(TorchFunctionMode):
    def __init__(self, note: Any) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in CALLS:
            self.note(function.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """While it lasts, counts waits by what waits, as `FILE:FUNCTION OPERATION`."""
    found: Counter[str] = Counter()

    def note(operation: str) -> None:
        stack = [
            frame for frame in traceback.extract_stack() if any(f"/{p}/" in frame.filename for p in PLACES)
        ]
        place = f"{Path(stack[-1].filename).name}:{stack[-1].name}" if stack else "elsewhere"
        found[f"{place} {operation}"] += 1

    with _Calls(note), _Operators(note):
        yield found
