"""How much padding packed batches save, on lengths like those of LLaVA-1.5's finetuning mixture.

    python -m benchmarks.packing [--samples 20000] [--batch 16] [--image_tokens 576 16]

Compared in one run: random order, the trainer's own grouping by modality and length, and packing. Printed is
the share of the computed tokens that are padding, and the tokens computed relative to packing. With
`--data_path` the lengths are those of your own mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.support.measure import sized_parser, table
from llava_ext.data.sampler import modality_grouped_order

SYSTEM_TOKENS = 45


def synthetic_words(samples: int, seed: int = 0) -> np.ndarray:
    """Words per sample as LLaVA counts them, negative for text-only ones.

    Shapes after the public mixture: 6 % text-only dialogues, long and broad (ShareGPT); a third short answers
    (VQA); the rest multi-turn visual dialogues.
    """
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, size=samples, p=[0.06, 0.34, 0.60])
    words = np.where(kind == 0, rng.lognormal(5.9, 0.9, samples), rng.lognormal(4.4, 0.55, samples))
    words = np.where(kind == 1, rng.lognormal(3.0, 0.4, samples), words)
    words = words.clip(5, 1500).astype(np.int64)
    return np.where(kind == 0, -words, words)


def token_lengths(words: np.ndarray, image_tokens: int, limit: int) -> np.ndarray:
    """Sequence lengths at the LLM's input: about 1.35 tokens a word, the system prompt, an image where
    there is one.
    """
    tokens = (np.abs(words) * 1.35).astype(np.int64) + SYSTEM_TOKENS + np.where(words > 0, image_tokens, 0)
    return np.minimum(tokens, limit)


def padded_cost(lengths: np.ndarray, order: Sequence[int], batch: int) -> int:
    """Tokens that padded batches of this order compute."""
    rows = lengths[np.asarray(order)]
    rows = rows[: len(rows) // batch * batch].reshape(-1, batch)
    return int((rows.max(1) * batch).sum())


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = sized_parser(__doc__, argv, samples=(20_000, 500))
    parser.add_argument("--batch", type=int, default=16, help="samples per device and step")
    parser.add_argument(
        "--devices", type=int, default=8, help="the grouped order balances batches between them"
    )
    parser.add_argument("--image_tokens", type=int, nargs="*", default=[576, 64, 16, 1])
    parser.add_argument("--model_max_length", type=int, default=2048)
    parser.add_argument(
        "--data_path", help="a LLaVA JSON or a mixture's samples.json; its lengths instead of synthetic ones"
    )
    parser.add_argument("--image_folder", default=".")
    options = parser.parse_args(argv)
    words = synthetic_words(options.samples)
    if options.data_path:
        from llava_ext.data.samples import open_samples

        words = np.asarray(open_samples(options.data_path, options.image_folder).lengths, dtype=np.int64)
    print(f"{len(words)} samples, {100 * (words < 0).mean():.0f} % text-only, batches of {options.batch}")
    rows = []
    for image_tokens in options.image_tokens:
        lengths = token_lengths(words, image_tokens, options.model_max_length)
        rows += measured(words, lengths, image_tokens, options.batch, options.devices)
    print(table(("tokens per image", "order", "padding", "tokens computed, packed = 1"), rows))


def measured(
    words: np.ndarray, lengths: np.ndarray, image_tokens: int, batch: int, devices: int
) -> list[tuple[object, ...]]:
    """The three rows for one number of tokens per image."""
    torch.manual_seed(0)
    orders = {
        "random": torch.randperm(len(words)).tolist(),
        "grouped by modality": modality_grouped_order(words, batch, devices, None),
    }
    rows: list[tuple[object, ...]] = []
    for name, order in orders.items():
        used = len(order) // batch * batch
        real, cost = int(lengths[np.asarray(order[:used])].sum()), padded_cost(lengths, order, batch)
        rows.append((image_tokens, name, f"{100 * (1 - real / cost):.1f}%", f"{cost / real:.2f}"))
    return [*rows, (image_tokens, "packed", "0.0%", "1.00")]


if __name__ == "__main__":
    main()
