"""LLaVA's image preprocessing from JPEG bytes: ours against transformers' processor.

python -m benchmarks.preprocess [--images 40] [--repeats 5]
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from benchmarks.support.measure import interleaved, sized_parser, table
from llava_ext.data.images import ImagePreprocessor, decode
from tests.support.damage import jpeg


def expand_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """What LLaVA does before the processor."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    options = sized_parser(__doc__, argv, images=(40, 2), repeats=(5, 1)).parse_args(argv)
    torch.set_num_threads(1)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    ours = ImagePreprocessor.from_processor(processor, "pad")
    colour = tuple(int(value * 255) for value in processor.image_mean)
    sizes = [(640, 480), (480, 640), (500, 375), (640, 427)]
    files = [jpeg(seed, size=sizes[seed % 4], quality=90) for seed in range(options.images)]

    def theirs(data: bytes):
        image = expand_to_square(Image.open(io.BytesIO(data)).convert("RGB"), colour)
        return processor(image, return_tensors="pt")["pixel_values"][0]

    different = max(float((ours(decode(data)) - theirs(data)).abs().max()) for data in files)
    costs = interleaved(
        {
            "llava_ext, float32": lambda: [ours(decode(data)) for data in files],
            "llava_ext, uint8": lambda: [ours.uint8(decode(data)) for data in files],
            "Pillow, padding, transformers' CLIP processor": lambda: [theirs(data) for data in files],
        },
        options.repeats,
    )
    base = costs["Pillow, padding, transformers' CLIP processor"].cpu
    rows = [(n, f"{c.cpu / len(files) * 1000:.1f}", f"{base / c.cpu:.2f}") for n, c in costs.items()]
    print(table(("way", "CPU ms an image", "x faster"), rows))
    level = 1 / 255 / np.mean(processor.image_std)
    print(f"\nlargest difference of pixel values: {different:.2g} (one level is {level:.2g})")


if __name__ == "__main__":
    main()
