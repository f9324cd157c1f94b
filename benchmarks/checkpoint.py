"""What a save of the whole training state costs, in seconds and bytes, against transformers' Trainer on the
same training.

    python -m benchmarks.checkpoint [--hidden 512] [--layers 8] [--repeats 5]

Two trainings of a random Llama of that size are made ready by one step each, stage 1 (the projector) and
stage 2 (projector and LLM), and saved in turns by `llava_ext` and by the stock Trainer's own code. Ours lists
every file with its CRC and forces it to the disk before the checkpoint gets its name; the stock save is
followed by a `sync`, so that both survive a power cut.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.measure import ROOT, interleaved, sized_parser, table

DATA = ROOT / "tests/golden/data"


def make_llm(folder: Path, hidden: int, layers: int) -> None:
    """A random language model with the tests' tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DATA / "tokenizer" / name, Path(folder) / name)
    config = LlamaConfig.from_pretrained(DATA / "llm")
    config.update(
        {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": hidden // 8,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def ready(stage: int, llm: Path, output_dir: Path) -> Any:
    """A trainer of that stage after one step."""
    from llava_ext.distributed import processes
    from llava_ext.training.arguments import parse
    from llava_ext.training.setup import make_trainer, open_inputs

    flags = ["--tune_mm_mlp_adapter", "True", "--version", "plain"] if stage == 1 else ["--version", "v1"]
    flags += ["--model_name_or_path", str(llm), "--vision_tower", str(DATA / "clip_g4"), "--use_cpu", "True"]
    flags += ["--data_path", str(DATA / f"train/stage{stage}.json"), "--image_folder", str(DATA / "images")]
    flags += ["--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2", "--report_to", "none"]
    flags += ["--per_device_train_batch_size", "1", "--max_steps", "1", "--save_strategy", "no"]
    flags += ["--model_max_length", "512", "--preflight_samples", "0", "--output_dir", str(output_dir)]
    output_dir.mkdir()
    arguments = parse(flags)
    processes.start(arguments.training)
    trainer = make_trainer(arguments, *open_inputs(arguments))
    trainer.train()
    return trainer


def save(trainer: Any, stock: bool) -> int:
    """Saves once and returns the bytes of the checkpoint, which is deleted again."""
    from transformers import Trainer

    target = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    shutil.rmtree(target, ignore_errors=True)
    trainer._saved_step = -1
    if stock:
        ours = trainer.__class__
        trainer.__class__ = type("Stock", (ours,), {"save_model": Trainer.save_model})
        Trainer._save_checkpoint(trainer, trainer.model, None)
        trainer.__class__ = ours
        os.sync()
    else:
        trainer._save_checkpoint(trainer.model, None)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = sized_parser(__doc__, argv, hidden=(512, 64), layers=(8, 1), repeats=(5, 1))
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        llm = Path(folder) / "llm"
        llm.mkdir()
        make_llm(llm, options.hidden, options.layers)
        for stage in (1, 2):
            trainer = ready(stage, llm, Path(folder) / f"stage{stage}")
            rows += measured(trainer, stage, options.repeats)
    print(table(["saved by", "stage", "MB", "seconds", "bytes, ours = 1", "seconds, ours = 1"], rows))


def measured(trainer: Any, stage: int, repeats: int) -> list[list[object]]:
    """The two rows of a stage."""
    sizes = {name: save(trainer, name != "llava_ext") / 1e6 for name in ("llava_ext", "stock Trainer, sync")}
    costs = interleaved(
        {name: lambda name=name: save(trainer, name != "llava_ext") for name in sizes}, repeats
    )
    size, cost = sizes["llava_ext"], costs["llava_ext"].wall
    return [
        [
            name,
            stage,
            f"{sizes[name]:.1f}",
            f"{costs[name].wall:.2f}",
            f"{sizes[name] / size:.1f}",
            f"{costs[name].wall / cost:.1f}",
        ]
        for name in sizes
    ]


if __name__ == "__main__":
    main()
