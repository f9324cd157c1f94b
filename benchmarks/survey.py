"""The survey of a mixture against the tokenizer's own speed on the same text.

    python -m benchmarks.survey [--samples 20000] [--tokenizer FOLDER] [--data_path samples.json]

The floor is the tokenizer alone, which sees each sample's text once. The survey tokenises more: training's
masks need the ids of every round and of every question as well. The rival is what one would write: training's
encoding, one sample after the other. Without a tokenizer's folder one of Llama's kind is trained on the spot.
"""

from __future__ import annotations

import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.measure import Cost, interleaved, sized_parser, table
from benchmarks.support.synthetic import record, text
from llava_ext.data.assembly import Collator
from llava_ext.data.conversation import dialogue_text, encode
from llava_ext.data.samples import SampleStore, open_samples
from llava_ext.data.survey import Surveyor
from llava_ext.data.templates import template
from workflow_scripts.survey import step

LIMIT, IMAGE_TOKENS = 2048, (576, 64, 1)
VERSION = "v1"


def llama_like() -> Any:
    """A tokenizer of Llama's kind, without a pre-tokenizer that splits at spaces, as LLaVA's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    rng = random.Random(0)
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=specials, show_progress=False)
    bpe.train_from_iterator((text(rng, 50) for _ in range(200)), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, legacy=False, model_max_length=LIMIT)
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def write_samples(path: Path, samples: int) -> None:
    """Dialogues of LLaVA's instructions: one or several turns, a few long ones without a picture."""
    rng = random.Random(1)
    shapes = ((1, 8), (4, 42), (6, 10), (8, 120))
    lines = [
        record(
            rng,
            number,
            None if number % 16 == 15 else "0.jpg",
            *shapes[3 if number % 16 == 15 else number % 3],
        )
        for number in range(samples)
    ]
    path.write_text("[" + ",\n".join(lines) + "]")


def whole_texts(store: SampleStore) -> list[str]:
    """Each sample's text, as its template writes it."""
    style = template(VERSION)
    roles = dict(zip(("human", "gpt"), style.roles, strict=True))
    return [
        dialogue_text(style, [(roles[turn["from"]], turn["value"]) for turn in found["conversations"]])
        for found in (store.record(index) for index in range(len(store)))
    ]


def surveyor(store: SampleStore, tokenizer: Any) -> Surveyor:
    """For three numbers of tokens per image at once."""
    image = len(tokenizer)
    collators = [
        Collator(image, [image] * tokens, tokenizer.pad_token_id, model_max_length=LIMIT)
        for tokens in IMAGE_TOKENS
    ]
    return Surveyor(store, tokenizer, VERSION, LIMIT, collators)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = sized_parser(__doc__, argv, samples=(20_000, 200), repeats=(3, 1))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokenizer", help="folder of a language model's tokenizer")
    parser.add_argument(
        "--data_path", help="a LLaVA JSON or a mixture's samples.json instead of synthetic ones"
    )
    options = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from llava_ext.model.folders import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer, LIMIT) if options.tokenizer else llama_like()
    with tempfile.TemporaryDirectory() as name:
        path = Path(options.data_path or Path(name) / "samples.json")
        if not options.data_path:
            write_samples(path, options.samples)
        compare(open_samples(path, "."), tokenizer, options)


def compare(store: SampleStore, tokenizer: Any, options: Any) -> None:
    """Runs all ways in turns and prints what they took."""
    texts, looking = whole_texts(store), surveyor(store, tokenizer)
    megabytes = sum(len(item.encode()) for item in texts) / 1e6
    backend = tokenizer.backend_tokenizer
    ways = {
        "the tokenizer alone": lambda: [backend.encode(item).ids for item in texts],
        "training's encoding, sample by sample": lambda: [
            encode(store.record(index), tokenizer, VERSION, LIMIT) for index in range(len(store))
        ],
        "this survey, 1 process": lambda: [*step.measured_chunks(looking, 1)],
        f"this survey, {options.processes} processes": lambda: shared(looking, options.processes),
    }
    costs = interleaved(ways, options.repeats)
    base = costs["the tokenizer alone"].cpu
    rows = [
        (name, f"{len(store) / cost.cpu:.0f}", f"{base / cost.cpu:.2f}", f"{len(store) / cost.wall:.0f}")
        for name, cost in costs.items()
    ]
    print(
        f"{len(store)} samples, {megabytes:.1f} MB of text, {len(IMAGE_TOKENS)} numbers of tokens per image\n"
    )
    print(table(("way", "samples a CPU s", "x the tokenizer's own speed", "samples a s"), rows))


def shared(looking: Surveyor, processes: int) -> Cost:
    """What all processes took together."""
    before, start = _children(), time.perf_counter()
    own = time.process_time()
    for _ in step.measured_chunks(looking, processes):
        pass
    cpu = time.process_time() - own + _children() - before
    return Cost(cpu, time.perf_counter() - start)


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
