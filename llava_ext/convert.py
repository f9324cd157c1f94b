"""Checkpoints between the HF layout and the original LLaVA layout, both ways, interventions included.

    python -m llava_ext.convert liuhaotian-llava-v1.5-7b/ hf/ --to hf
    python -m llava_ext.convert stage1/ hf/ --to hf --llm vicuna-7b-v1.5/ --tower clip-vit-large-patch14-336/
    python -m llava_ext.convert hf/ original/ --to llava --vision_tower openai/clip-vit-large-patch14-336

The source may be a stock or intervention HF checkpoint, a whole original checkpoint, or, with its base LLM, a
stage-1 folder (`config.json` and `mm_projector.bin`) or a LoRA folder of LLaVA's (adapters and
`non_lora_trainables.bin`), whose adapters are merged. Pickles are read as tensors only; no code from a
checkpoint is run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .checkpoints import original
from .errors import TrainingError, say
from .files import follow_umask
from .model.interventions import Interventions
from .training.flag_options import add_interventions, take_interventions

DTYPES = ("float32", "float16", "bfloat16")


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    llm: str | None = None,
    tower: str | None = None,
    vision_tower: str | None = None,
    dtype: str | None = None,
    projector_only: bool = False,
    expected: Interventions | None = None,
) -> None:
    """Converts one checkpoint; the target appears only when it is complete.

    Args:
        to: ``hf`` or ``llava`` (the original layout).
        vision_tower: what an original ``config.json`` names as its tower; default: what the source names.
        dtype: of the written weights; default: as in the source.
        expected: refuse a source with other interventions.

    Raises:
        TrainingError: the target exists, the source is incomplete, or interventions differ.
    """
    import torch

    from .checkpoints.stored import load_model, save_checkpoint

    if target.exists() and any(target.iterdir()):
        raise TrainingError(f"{target}: exists and is not empty; choose another folder")
    kind = getattr(torch, dtype) if dtype else None
    model, tokenizer, processor = load_model(source, dtype=kind or "auto", llm=llm, tower=tower)  # type: ignore[arg-type]
    if expected is not None:
        original.check_interventions(expected, model.config.interventions, str(source))
    settings = {"_name_or_path": llm} if llm else {}
    if to == "llava":
        settings["mm_vision_tower"] = vision_tower or tower or _named_tower(source)
    sentencepiece = original.find_sentencepiece(source, llm)
    with _appearing(target) as staging:
        if to == "hf":
            version, aspect = model.config.prompt_version, model.config.image_aspect_ratio
            save_checkpoint(
                model, tokenizer, processor, staging, prompt_version=version, image_aspect_ratio=aspect
            )
            original.keep_sentencepiece(sentencepiece, staging)
        else:
            original.export_original(model, tokenizer, staging, settings, projector_only, sentencepiece)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that gets its name when all is written."""
    staging = target.with_name(f".{target.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        yield staging
        follow_umask(staging)
        target.mkdir(parents=True, exist_ok=True)
        target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _named_tower(source: Path) -> str:
    described = json.loads((source / "config.json").read_text(encoding="utf-8"))
    named = described.get("mm_vision_tower") or (described.get("vision_config") or {}).get("_name_or_path")
    if not named:
        raise TrainingError(
            f"{source}: its config.json does not name its vision tower; give --vision_tower, which the"
            " original layout needs"
        )
    return str(named)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_ext.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="checkpoint folder")
    parser.add_argument("target", type=Path, help="folder to be made")
    parser.add_argument("--to", choices=("hf", "llava"), required=True, help="layout of the target")
    parser.add_argument("--llm", help="base LLM of a stage-1 or LoRA folder")
    parser.add_argument(
        "--tower", help="vision tower of an original checkpoint, if the path in its config is not here"
    )
    parser.add_argument(
        "--vision_tower", help="name of the vision tower in an original config.json (a path or hub id)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as in the source)")
    parser.add_argument(
        "--projector_only", action="store_true", help="with --to llava: mm_projector.bin and config.json only"
    )
    add_interventions(
        parser, "interventions that the source must have (any other is refused; none given: any)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Converts; errors are one readable message."""
    options = make_parser().parse_args(argv)
    try:
        if not (options.source / "config.json").is_file():
            raise TrainingError(f"{options.source}: no config.json; give a checkpoint folder")
        convert(
            options.source,
            options.target,
            options.to,
            llm=options.llm,
            tower=options.tower,
            vision_tower=options.vision_tower,
            dtype=options.dtype,
            projector_only=options.projector_only,
            expected=take_interventions(options),
        )
    except (TrainingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    say(f"wrote {options.target}")


if __name__ == "__main__":
    main()
