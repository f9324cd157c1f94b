"""Training steps against what one would run instead, each in a process of its own, in turns.

    python -m benchmarks.train_step [--stages stage1 lora full] [--pooled 4] [--hidden 256] [--layers 4]
        [--steps 12] [--batch 8] [--grid 4]

Compared: (a) as the original code computes them, padded, every layer recomputed, logits of every token;
(b) stock `LlavaForConditionalGeneration` with transformers' Trainer; (c) this trainer with everything off;
(d) this trainer with packing and attention by segments, nothing recomputed. The same samples in the same
order, lengths as in LLaVA's mix; (a) and (b) get their batches ready made, (c) and (d) have one dataset
worker. Stage 1 trains the projector, LoRA adapters and projector, full all but the tower; `--pooled N` is a
second round with N vision tokens a picture (stock transformers has none such, so (b) is left out).
Losses of the first step have to agree in float32, or nothing is printed. On a GPU bfloat16 is timed; with
`--hidden 4096 --layers 12 --grid 24 --pooled 16` the sizes are those of LLaVA-7B.

TFLOP/s are those of llava_ext/flops.py, which count neither padding nor recomputation; beside them the share
of a plain matrix product measured in the same run. Device waits are counted in the second step: on a GPU
torch's own warnings, on the CPU what would be one. On the CPU memory is the process's, and a second is one of
its own, so that what else the machine does is no part of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.packing import synthetic_words
from benchmarks.support.measure import ROOT, sized_parser, table
from tests.support import warm

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
# What trains, in the flags of this trainer; dropout would make every first loss another.
STAGES = {
    "stage1": ["--tune_mm_mlp_adapter", "True"],
    "lora": ["--lora_enable", "True", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0"],
    "full": [],
}
# Both sum in another order than this trainer does.
BOUND = 2e-4
HOST = ("adam.py", "adamw.py", "optimizer.py", "sampler.py")
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
    _begin(folder, options)
    records = [_record(number, int(count), draw) for number, count in enumerate(words)]
    (folder / "samples.json").write_text(json.dumps(records))


def _interventions(options: argparse.Namespace) -> Any:
    from llava_ext.model.interventions import Interventions

    return Interventions(
        compression_after_projection=bool(options.tokens), final_spatial_size=options.tokens or None
    )


def _begin(folder: Path, options: argparse.Namespace) -> None:
    """The model that every way begins with: a checkpoint, and its projector for this trainer."""
    import torch

    from llava_ext.checkpoints.original import export_original
    from llava_ext.checkpoints.stored import save_checkpoint
    from llava_ext.model.build import build_model

    torch.manual_seed(0)
    model, tokenizer, images = build_model(folder / "llm", folder / "tower", _interventions(options))
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

    model, tokenizer, images = build_model(folder / "llm", folder / "tower", _interventions(options))
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
    """Moments at which the optimizer has stepped, and the losses, written for the parent process. On the CPU
    it counts this process's own seconds: others may compute beside it.
    """

    def __init__(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.times: list[float] = []
        self.losses: list[float] = []
        self.data_wait: float | None = None
        self.waits = Waits()
        register_optimizer_step_post_hook(self._step)

    def _step(self, *_: Any) -> None:
        self.waits.step()
        self.times.append(time.perf_counter() if _device() == "cuda" else time.process_time())

    def write(self, path: Path) -> None:
        """The result of a way."""
        found = {"times": self.times, "losses": self.losses, "data_wait": self.data_wait}
        path.write_text(json.dumps(found | {"waits": self.waits.count, "peak": _peak()}))


def _peak() -> float:
    """Most bytes that were in use: of the GPU, else of this process."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Waits:
    """Counts what the host waits for its device for, from the end of the first step to that of the second."""

    def __init__(self) -> None:
        self.count: int | None = None
        self.found: Any = None
        self.stack = ExitStack()

    def step(self) -> None:
        """A step is over."""
        import torch

        from tests.support.waits import counted

        if self.count is not None:
            return
        if self.found is not None:
            self.stack.close()
            self.count = len(self.found) if isinstance(self.found, list) else _waits(self.found)
        elif torch.cuda.is_available():
            self.found = self.stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self.stack.callback(torch.cuda.set_sync_debug_mode, "default")
            torch.cuda.set_sync_debug_mode("warn")
        else:
            self.found = self.stack.enter_context(counted())


def _waits(found: Mapping[str, int]) -> int:
    """Those of a step on a GPU; the optimizer's own counters lie on the host there too."""
    return sum(count for place, count in found.items() if not place.startswith(HOST))


def load_begun(folder: Path, options: argparse.Namespace, half: bool) -> Any:
    """The checkpoint of the beginning, stock where it is one, of which the stage's parts train, on the GPU
    where there is one.
    """
    import torch
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    from llava_ext.model.modeling_spatial_llava import SpatialLlavaForConditionalGeneration

    kind = SpatialLlavaForConditionalGeneration if options.tokens else LlavaForConditionalGeneration
    model = kind.from_pretrained(folder / "start", dtype=torch.float32)
    # The checkpoint's rows beyond the tokenizer, a tenth of this small vocabulary, are no part of the loss.
    real = len(AutoTokenizer.from_pretrained(folder / "llm"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:real].detach().clone())
    model.config.text_config.vocab_size = real
    model = _freeze(model, options.stage)
    model.train()
    return model.to(_device(), torch.bfloat16 if half else torch.float32)


def _freeze(model: Any, stage: str) -> Any:
    """Leaves on what trains in a stage; with adapters for LoRA."""
    from llava_ext.training.lora import add_adapters
    from llava_ext.training.optimizer import freeze

    if stage == "lora":
        return add_adapters(model, rank=16, alpha=32, dropout=0.0, bias="none")
    freeze(model, tune_mm_mlp_adapter=stage == "stage1", freeze_mm_mlp_adapter=False, freeze_backbone=False)
    return model


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def original(folder: Path, options: argparse.Namespace) -> Clock:
    """(a): padded, every layer recomputed, logits of every token."""
    import torch

    half = _device() == "cuda" and not options.gate
    model, clock = load_begun(folder, options, half), Clock()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    for batch in list(batches(folder, options)):
        loss = model(**{key: value.to(_device()) for key, value in batch.items()}, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(float(loss))
    return clock


def stock(folder: Path, options: argparse.Namespace) -> Clock:
    """(b): transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock, half = Clock(), _device() == "cuda" and not options.gate

    class Ticks(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    arguments = TrainingArguments(
        output_dir=str(folder / "stock"), per_device_train_batch_size=1, learning_rate=1e-3, logging_steps=1,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to=[], bf16=half,
        use_cpu=_device() == "cpu", train_sampling_strategy="sequential", max_steps=options.steps,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    data = list(batches(folder, options))
    Trainer(
        load_begun(folder, options, False),
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
    half, clock = _device() == "cuda" and not options.gate, Clock()
    flags = {
        "model_name_or_path": folder / "llm", "vision_tower": folder / "tower", "version": "v1",
        "data_path": folder / "samples.json", "image_folder": folder / "images", "image_aspect_ratio": "pad",
        "pretrain_mm_mlp_adapter": folder / "projector/mm_projector.bin", "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "output_dir": out, "per_device_train_batch_size": options.batch,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0, "sampling": "sequential",
        "max_steps": options.steps, "logging_steps": 1, "save_strategy": "no", "model_max_length": 2048,
        "report_to": "none", "bf16": half, "use_cpu": _device() == "cpu", "weight_decay": 0.0,
        "dataloader_num_workers": 1,
    }  # fmt: skip
    if options.tokens:
        flags |= {"compression_after_projection": True, "final_spatial_size": options.tokens}
    argv = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    train.main(argv + STAGES[options.stage] + KERNELS[options.way])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        clock.losses.append(row["loss"])
    clock.data_wait = median(row["data_wait_share"] for row in rows[WARM:])
    return clock


# -- the table -------------------------------------------------------------------------------------------


def run_way(way: str, folder: Path, options: argparse.Namespace, gate: bool) -> dict[str, Any]:
    """One way in a process of its own, whose libraries are loaded: losses, times and what else was seen.
    Raises SystemExit with its output if it fails.
    """
    result, log = folder / f"{way}.json", folder / f"{way}.log"
    argv = [*options.given, "--way", way, "--folder", str(folder), "--tokens", str(options.tokens)]
    argv += ["--stage", options.stage, *(["--gate"] if gate else [])]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}
    log.unlink(missing_ok=True)
    status = warm.run("benchmarks.train_step", argv, log, ROOT, environment, timeout=3600)
    if status or not result.is_file():
        raise SystemExit(f"{WAYS[way]} failed:\n{log.read_text()[-3000:]}")
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


@dataclass(frozen=True)
class Sample:
    """The mean sample: real tokens, operations of its products, and the padding of the padded ways."""

    tokens: float
    flops: float
    padding: float


def mean_sample(folder: Path, options: argparse.Namespace) -> Sample:
    """Of the samples that all ways compute."""
    from llava_ext.flops import Counted
    from llava_ext.model.build import build_model
    from llava_ext.training.throughput import products_of

    model, _, _ = build_model(folder / "llm", folder / "tower", _interventions(options))
    found = list(batches(folder, options))
    lengths = [int(length) for batch in found for length in batch["attention_mask"].sum(1)]
    labels = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in found)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    images = sum(len(batch.get("pixel_values", ())) for batch in found)
    flops = products_of(_freeze(model, options.stage)).flops(Counted(sum(lengths), pairs, labels, images))
    computed = sum(batch["attention_mask"].numel() for batch in found)
    return Sample(sum(lengths) / len(lengths), flops / len(lengths), 1 - sum(lengths) / computed)


def product_speed() -> float:
    """FLOP/s of a plain matrix product here, by the clock of the steps: the best of ten."""
    import torch

    cuda = _device() == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    size, kind = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    matrix, seconds = torch.ones(size, size, dtype=kind, device=_device()), []
    for _ in range(10):
        start = clock()
        torch.mm(matrix, matrix)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return float(2 * size**3 / min(seconds))


HEAD = (
    "way", "samples/s", "real tokens/s", "TFLOP/s", "of a product", "peak GB", "device waits a step",
    "padding", "data wait", "against (a)",
)  # fmt: skip


def rows_of(
    found: dict[str, list[dict[str, Any]]], sample: Sample, product: float, batch: int
) -> list[tuple[object, ...]]:
    """The table's rows: medians over the repeats."""
    speeds = {way: median(_speed(content, batch) for content in runs) for way, runs in found.items()}
    return [
        (
            WAYS[way],
            f"{speed:.2f}",
            f"{speed * sample.tokens:.0f}",
            f"{speed * sample.flops / 1e12:.4g}",
            f"{speed * sample.flops / product:.0%}",
            f"{max(content['peak'] for content in found[way]) / 1e9:.2f}",
            found[way][0]["waits"],
            f"{0 if way == 'shipped' else sample.padding:.0%}",
            "ready made" if found[way][0]["data_wait"] is None else f"{found[way][0]['data_wait']:.0%}",
            f"{speed / speeds['original']:.2f}x",
        )
        for way, speed in speeds.items()
    ]


def _speed(content: dict[str, Any], batch: int) -> float:
    """Samples a second after the first steps."""
    times = content["times"]
    return float((len(times) - WARM) * batch / (times[-1] - times[WARM - 1]))


def measure(options: argparse.Namespace) -> list[tuple[object, ...]]:
    """The rows of one stage and one number of vision tokens."""
    ways = [way for way in WAYS if not (way == "stock" and options.tokens)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options)
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        if options.half:
            check_gate({way: run_way(way, folder, options, gate=True) for way in ways})
        for _ in range(options.repeats):
            timed = {way: run_way(way, folder, options, gate=False) for way in ways}
            if not options.half:  # float32 as it is
                check_gate(timed)
            for way, content in timed.items():
                found[way].append(content)
        return rows_of(found, mean_sample(folder, options), options.product, options.batch)


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = sized_parser(
        __doc__ or "", given, hidden=(256, 64), layers=(4, 2), steps=(12, 4), batch=(8, 4), grid=(4, 4),
        repeats=(3, 1), pooled=(4, 0),
    )  # fmt: skip
    stages = ["full"] if "--smallest" in given else list(STAGES)
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=stages, help="what trains")
    parser.add_argument("--way", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=tuple(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--gate", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table a stage and number of vision tokens."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = _parser(given).parse_args(given)
    if options.way:
        way = {"original": original, "stock": stock}.get(options.way, ours)
        way(options.folder, options).write(options.folder / f"{options.way}.json")
        return
    options.given, options.half, options.product = given, _device() == "cuda", product_speed()
    print(f"a plain matrix product: {options.product / 1e12:.4g} TFLOP/s\n")
    for stage, tokens in itertools.product(options.stages, sorted({0, options.pooled})):
        options.stage, options.tokens = stage, tokens
        with warm.servers():
            rows = measure(options)
        print(f"{stage}, {tokens or options.grid**2} vision tokens a picture;", end=" ")
        print(f"the first losses agree within {BOUND:g} in float32\n")
        print(table(HEAD, rows), end="\n\n")


if __name__ == "__main__":
    main()
