"""How a finished checkpoint generates by default. Plain Python."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

# In a generation_config.json: `do_sample` was set because the file can't be saved without it, not because its
# owner samples.
REPAIRED = "do_sample_repaired"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def exported_generation(base: Any, ends: Sequence[int]) -> Any:
    """A language model's generation config as its LLaVA checkpoint has it.

    Greedy, unless the LLM's owner asked for sampling (`do_sample: true` in the model's own file). It ends
    with an answer's end (``ends``), or with what ended the LLM's texts. Without ``max_length``, which beside
    a call's ``max_new_tokens`` only warns.
    """
    chosen = copy.deepcopy(base)
    chosen.max_length = None
    known = chosen.eos_token_id if isinstance(chosen.eos_token_id, list) else [chosen.eos_token_id]
    every = list(dict.fromkeys(index for index in (*ends, *known) if index is not None))
    chosen.eos_token_id = every[0] if len(every) == 1 else every or None
    if not chosen.do_sample or getattr(chosen, REPAIRED, False):
        chosen.do_sample = False
        for name in SAMPLING:
            setattr(chosen, name, None)
    vars(chosen).pop(REPAIRED, None)
    return chosen
