"""Training steps against what one would run instead, each in a process of its own, in turns.

    python -m benchmarks.train_step [--hidden 256] [--layers 4] [--steps 12] [--batch 8] [--grid 4]

Compared: (a) as the original code computes them, padded, every layer recomputed, logits of every token;
(b) stock `LlavaForConditionalGeneration` with transformers' Trainer; (c) this trainer with everything off;
(d) this trainer with packing and attention by segments, nothing recomputed. The same samples in the same
order, full training of the LLM, lengths as in LLaVA's mix; (a) and (b) get their batches ready made. Losses
of the first step have to agree in float32, or nothing is printed. On a GPU bfloat16 is timed; with
`--hidden 4096 --layers 12 --grid 24` the sizes are those of LLaVA-7B.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.packing import synthetic_words
from benchmarks.support.measure import ROOT, sized_parser, table

WAYS = {
    "original": "(a) original-like: padded, all layers recomputed, logits everywhere",
    "stock": "(b) stock LlavaForConditionalGeneration, stock Trainer",
    "plain": "(c) this trainer, everything off",
    "shipped": "(d) this trainer, packed, attention by segments",
}
KERNELS = {
    "plain": ["--attention", "sdpa", "--checkpoint_layers", "none"],
    "shipped": ["--attention", "varlen", "--pack", "True", "--checkpoint_layers", "none"],
}
# Both sum in another order than this trainer does.
BOUND = 2e-4
WARM = 2
"""Steps before the clock starts."""


# -- inputs ----------------------------------------------------------------------------------------------


def make_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Models of the asked sizes and conversations with LLaVA's lengths, about drawn pictures."""
    from PIL import Image

    from workflow_scripts.config.shapes import ShapesLlm, ShapesTower
    from workflow_scripts.demo.models import build

    llm = ShapesLlm(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        layers=options.layers,
        heads=max(1, options.hidden // 64),
        max_positions=2048,
    )
    build(llm, folder / "llm")
    build(ShapesTower(steps=0, image_size=14 * options.grid), folder / "tower")
    (folder / "images").mkdir()
    draw = random.Random(0)
    for number in range(8):
        colour = tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", (14 * options.grid,) * 2, colour).save(folder / f"images/{number}.png")
    words = synthetic_words(options.steps * options.batch)
    _begin(folder)
    records = [_record(number, int(count), draw) for number, count in enumerate(words)]
    (folder / "samples.json").write_text(json.dumps(records))


def _begin(folder: Path) -> None:
    """The model that every way begins with: a stock checkpoint, and its projector for this trainer."""
    import torch

    from llava_ext.checkpoints.original import export_original
    from llava_ext.checkpoints.stored import save_checkpoint
    from llava_ext.model.build import build_model

    torch.manual_seed(0)
    model, tokenizer, images = build_model(folder / "llm", folder / "tower")
    save_checkpoint(model, tokenizer, images, folder / "start", prompt_version="v1", image_aspect_ratio="pad")
    export_original(model, tokenizer, folder / "projector", {"mm_vision_tower": "tower"}, True, None)


def _record(number: int, words: int, draw: random.Random) -> dict[str, Any]:
    """Two turns of so many words together; negative: without a picture."""
    text = ["where", "what", "red", "blue", "left", "right", "square", "circle"]
    count = min(abs(words), 900)
    spoken = [draw.choice(text) for _ in range(max(count, 4))]
    middle = max(2, len(spoken) // 3)
    first = "<image>\n" if words > 0 else ""
    turns = [("human", first + " ".join(spoken[:middle])), ("gpt", " ".join(spoken[middle:]))]
    record: dict[str, Any] = {"id": str(number), "conversations": [{"from": a, "value": b} for a, b in turns]}
    return record | ({"image": f"{number % 8}.png"} if words > 0 else {})


# -- the ways, each in its own process -------------------------------------------------------------------


def batches(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The padded batches of all ways that are not this trainer, from its own dataset and collator."""
    from llava_ext.data.assembly import Collator
    from llava_ext.data.conversation import encode
    from llava_ext.data.images import ImagePreprocessor, decode
    from llava_ext.data.samples import open_samples
    from llava_ext.model.build import build_model

    model, tokenizer, images = build_model(folder / "llm", folder / "tower")
    store = open_samples(folder / "samples.json", folder / "images")
    collate = Collator.for_model(model.config, tokenizer, model_max_length=2048)
    preprocess = ImagePreprocessor.from_processor(images, "pad")
    for start in range(0, len(store) // options.batch * options.batch, options.batch):
        samples = []
        for place in range(start, start + options.batch):
            encoded = encode(store.record(place), tokenizer, "v1", 2048)
            pictures = [preprocess(decode(data)) for data in store.image_bytes(place)]
            samples.append({"input_ids": encoded.input_ids, "labels": encoded.labels, "images": pictures})
        batch = collate(samples)
        yield {
            key: batch[key]
            for key in ("input_ids", "labels", "attention_mask", "pixel_values")
            if key in batch
        }


class Clock:
    """Moments at which steps ended, and the losses, written for the parent process."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def step(self, loss: float) -> None:
        """A step is over."""
        self.times.append(time.perf_counter())
        self.losses.append(loss)

    def write(self, path: Path) -> None:
        """The result of a way."""
        path.write_text(json.dumps({"times": self.times, "losses": self.losses}))


def load_stock(folder: Path, half: bool) -> Any:
    """The stock model with a frozen tower, on the GPU where there is one."""
    import torch
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "start", dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    # The checkpoint's rows beyond the tokenizer, a tenth of this small vocabulary, are no part of the loss.
    real = len(AutoTokenizer.from_pretrained(folder / "llm"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:real].detach().clone())
    model.config.text_config.vocab_size = real
    model.train()
    return model.to(_device(), torch.bfloat16 if half else torch.float32)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def original(folder: Path, options: argparse.Namespace) -> Clock:
    """(a): padded, every layer recomputed, logits of every token."""
    import torch

    half = _device() == "cuda" and not options.gate
    model, clock = load_stock(folder, half), Clock()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    for batch in batches(folder, options):
        loss = model(**{key: value.to(_device()) for key, value in batch.items()}, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step(float(loss))
    return clock


def stock(folder: Path, options: argparse.Namespace) -> Clock:
    """(b): transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock, half = Clock(), _device() == "cuda" and not options.gate

    class Ticks(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                clock.step(float(logs["loss"]))

    arguments = TrainingArguments(
        output_dir=str(folder / "stock"), per_device_train_batch_size=1, learning_rate=1e-3, logging_steps=1,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to=[], bf16=half,
        use_cpu=_device() == "cpu", train_sampling_strategy="sequential", max_steps=options.steps,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    data = list(batches(folder, options))
    Trainer(
        load_stock(folder, False),
        arguments,
        lambda rows: rows[0],
        data,
        callbacks=[Ticks()],  # type: ignore[arg-type]
    ).train()
    return clock


def ours(folder: Path, options: argparse.Namespace) -> Clock:
    """(c) and (d): the command line of every training; its own metrics are the clock."""
    from llava_ext import train

    out = folder / f"{options.way}-{'gate' if options.gate else 'timed'}"
    half = _device() == "cuda" and not options.gate
    flags = {
        "model_name_or_path": folder / "llm", "vision_tower": folder / "tower", "version": "v1",
        "data_path": folder / "samples.json", "image_folder": folder / "images", "image_aspect_ratio": "pad",
        "pretrain_mm_mlp_adapter": folder / "projector/mm_projector.bin", "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "output_dir": out, "per_device_train_batch_size": options.batch,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0, "sampling": "sequential",
        "max_steps": options.steps, "logging_steps": 1, "save_strategy": "no", "model_max_length": 2048,
        "report_to": "none", "bf16": half, "use_cpu": _device() == "cpu", "weight_decay": 0.0,
        "dataloader_num_workers": 0,
    }  # fmt: skip
    train.main(
        [text for key, value in flags.items() for text in (f"--{key}", str(value))] + KERNELS[options.way]
    )
    clock = Clock()
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        clock.times.append(row["time"])
        clock.losses.append(row["loss"])
    return clock


# -- the table -------------------------------------------------------------------------------------------


def run_way(way: str, folder: Path, argv: Sequence[str], gate: bool) -> dict[str, Any]:
    """One way in a process of its own: losses and times. Raises SystemExit with its output if it fails."""
    result = folder / f"{way}.json"
    command = [sys.executable, "-m", "benchmarks.train_step", *argv, "--way", way, "--folder", str(folder)]
    command += ["--gate"] if gate else []
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not result.is_file():
        raise SystemExit(f"{WAYS[way]} failed:\n{done.stderr[-3000:]}")
    content: dict[str, Any] = json.loads(result.read_text())
    result.unlink()
    return content


def check_gate(found: dict[str, dict[str, Any]]) -> None:
    """Refuses to time ways that do not compute the same."""
    first = {way: content["losses"][0] for way, content in found.items()}
    reference = first["plain"]
    for way, loss in first.items():
        if abs(loss - reference) > BOUND * abs(reference):
            raise SystemExit(
                f"{WAYS[way]}: the first loss is {loss}, that of (c) {reference}; not the same work"
            )


def padding(folder: Path, options: argparse.Namespace) -> tuple[float, float]:
    """(real tokens a sample, share of padding of the padded ways)."""
    masks = [batch["attention_mask"] for batch in batches(folder, options)]
    real, all_of = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return real / (len(masks) * options.batch), 1 - real / all_of


def rows_of(found: dict[str, list[float]], tokens: float, share: float) -> list[tuple[object, ...]]:
    """The table's rows: medians over the repeats."""
    speeds = {way: sorted(values)[len(values) // 2] for way, values in found.items()}
    base = speeds["original"]
    return [
        (
            WAYS[way],
            f"{speed:.2f}",
            f"{speed * tokens:.0f}",
            f"{0 if way == 'shipped' else 100 * share:.0f}%",
            f"{speed / base:.2f}x",
        )
        for way, speed in speeds.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = sized_parser(
        __doc__ or "", given, hidden=(256, 64), layers=(4, 2), steps=(12, 4), batch=(8, 4), grid=(4, 4),
        repeats=(3, 1),
    )  # fmt: skip
    parser.add_argument("--way", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gate", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.way:
        way = {"original": original, "stock": stock}.get(options.way, ours)
        way(options.folder, options).write(options.folder / f"{options.way}.json")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options)
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        if _device() == "cuda":
            check_gate({way: run_way(way, folder, given, gate=True) for way in WAYS})
        for _ in range(options.repeats):
            timed = {way: run_way(way, folder, given, gate=False) for way in WAYS}
            if _device() == "cpu":  # float32 as it is
                check_gate(timed)
            for way, times in ((way, content["times"]) for way, content in timed.items()):
                found[way].append((len(times) - WARM) * options.batch / (times[-1] - times[WARM - 1]))
        print(f"the first losses agree within {BOUND:g} in float32")
        head = ("way", "samples/s", "real tokens/s", "padding", "against (a)")
        print(table(head, rows_of(found, *padding(folder, options))))


if __name__ == "__main__":
    main()
