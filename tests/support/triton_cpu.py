"""Triton's kernels on a CPU: its own interpreter, and two things that Liger's kernels take for granted."""

from __future__ import annotations

import numpy as np
import pytest

from llava_ext.training import kernels


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a test lasts, Liger's kernels run by NumPy, program by program.

    Compiled, a number with a fraction is a float32 of Triton's, which the interpreter leaves a Python number;
    and the square root that RMSNorm takes is a function of CUDA's library.
    """
    import liger_kernel.ops.rms_norm as norm
    import triton.language as language
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def convert(value: object) -> object:
        if not isinstance(value, float):
            return plain(value)
        held = interpreter.TensorHandle(np.array([value], dtype=np.float32), language.float32)
        return language.tensor(held, language.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(norm, "rsqrt", lambda number: language.rsqrt(number))


def keep_transformers(monkeypatch: pytest.MonkeyPatch, language: object) -> None:
    """What Liger changes of transformers for all models to come is taken back when the test ends."""
    module = __import__(type(language).__module__, fromlist=["_"])
    for name in (kernels.ROTATION, type(language.norm).__name__, type(language.layers[0].mlp).__name__):
        monkeypatch.setattr(module, name, getattr(module, name))
