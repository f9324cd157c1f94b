"""Builds the demo's models from nothing: a tiny Llama with its tokenizer, and a tiny CLIP vision tower.

Both become ordinary model folders that any transformers loads. The language model's folder gets the same
flawed generation_config.json as Vicuna's (a temperature without sampling), so that the demo walks through
the same repair as a real training. The tower is pre-trained for some seconds by contrast, as CLIP is:
pictures against descriptions, here (shape, colour, place) instead of sentences.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from llava_ext.files import follow_umask
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.shapes import ShapesLlm, ShapesTower
from workflow_scripts.demo import shapes
from workflow_scripts.io import progress, user_errors, write_json

if TYPE_CHECKING:
    import torch
    from transformers import CLIPVisionModel, LlamaTokenizer

# As in lmsys/vicuna-7b-v1.5: invalid, because temperature and top_p need do_sample.
VICUNA_GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_length": 4096,
    "pad_token_id": 0,
    "temperature": 0.9,
    "top_p": 0.6,
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def corpus() -> list[str]:
    """Every sentence that the demo can say, and the frame around it: what the tokenizer is trained on."""
    sentences = [f" {SYSTEM}", " ASSISTANT:", " Describe the picture.", f" {shapes.TWO_SHAPES}"]
    sentences += [f" {phrase}" for phrases in shapes.PHRASES.values() for phrase in phrases]
    for words in (shapes.SHAPES, shapes.COLOURS, shapes.QUADRANTS, shapes.NUMBERS):
        sentences += [f" {word}" for word in words]
    for question, answer in shapes.TEXT_ONLY:
        sentences += [f" {question}", f" {answer}"]
    filler = {"shape": "circle", "colour": "red", "quadrant": "top left"}
    sentences += [" " + caption.format(**filler) for caption in shapes.CAPTIONS]
    # In a conversation USER follows the end-of-sentence mark without a space. LLaVA's masks rely on a
    # property of Llama's tokenizer: USER is one piece, and one piece more with a space before it.
    return [*sentences, *["USER:"] * 2]


def _train_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of a BPE with Llama's layout: special tokens, 256 bytes, letters, words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()]
    )
    # A generous limit: training ends when each word of the corpus is one piece.
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, show_progress=False, special_tokens=[])
    bpe.train_from_iterator(corpus(), trainer)
    trained = json.loads(bpe.to_str())["model"]
    pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece, _ in sorted(trained["vocab"].items(), key=lambda item: item[1])]
    merges = [(left, right) for left, right in trained["merges"]]
    return {piece: index for index, piece in enumerate(pieces)}, merges


def build_tokenizer(max_length: int = 512) -> LlamaTokenizer:
    """A Llama tokenizer (BOS, byte fallback, pad = unk) trained on :func:`corpus`."""
    from transformers import LlamaTokenizer

    vocab, merges = _train_pieces()
    return LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        legacy=False,
        add_bos_token=True,
        add_eos_token=False,
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Runs a block with torch's global generator at ``seed``, then puts the old state back."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_llm(spec: ShapesLlm, folder: Path) -> None:
    """Writes a randomly initialised Llama, its tokenizer and Vicuna's generation_config.json."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(spec.max_positions)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        initializer_range=spec.initializer_range,
        max_position_embeddings=spec.max_positions,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with _seeded(spec.seed):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", VICUNA_GENERATION_CONFIG)


def scene_pixels(scenes: Sequence[shapes.Scene], rng: random.Random, size: int) -> torch.Tensor:
    """Draws scenes and normalises them as CLIP does: ``(scenes, 3, size, size)``, float32."""
    import numpy as np
    import torch

    pixels = np.stack([np.asarray(shapes.draw_scene(scene, rng, size)) for scene in scenes])
    values = (pixels.astype(np.float32) / 255 - np.array(CLIP_MEAN, np.float32)) / np.array(
        CLIP_STD, np.float32
    )
    return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())


def attribute_ids(scenes: Sequence[shapes.Scene]) -> torch.Tensor:
    """What a one-shape scene shows, as indices ``(scenes, 3)``: shape, colour, quadrant."""
    import torch

    colours = list(shapes.COLOURS)
    rows = [
        (shapes.SHAPES.index(s.shape), colours.index(s.colour), shapes.QUADRANTS.index(s.quadrant))
        for scene in scenes
        for s in scene.things
    ]
    return torch.tensor(rows)


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, same: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric loss over a batch, where pairs of equal description count as matches.

    ``images``, ``texts``: ``(batch, features)``; ``same``: ``(batch, batch)``, rows sum to one.
    """
    import torch.nn.functional as F

    logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * scale.exp()
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def pretrain_tower(tower: CLIPVisionModel, spec: ShapesTower) -> list[float]:
    """Trains the tower's last-but-one layer, mean-pooled and with places kept, against descriptions.

    Returns the loss of each step. The head and the description encoder are thrown away afterwards.
    """
    import torch
    from torch import nn

    rng = random.Random(f"tower {spec.seed}")
    patches = (spec.image_size // spec.patch_size) ** 2
    head = nn.Linear(spec.hidden_size * patches, 64)
    tables = nn.ModuleList(
        nn.Embedding(n, 64) for n in (len(shapes.SHAPES), len(shapes.COLOURS), len(shapes.QUADRANTS))
    )
    mixer = nn.Sequential(nn.Linear(192, 128), nn.GELU(), nn.Linear(128, 64))
    scale = nn.Parameter(torch.tensor(math.log(10.0)))
    parameters = [*tower.parameters(), *head.parameters(), *tables.parameters(), *mixer.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, spec.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / max(1, spec.steps)))),
    )
    losses = []
    for _ in progress(range(spec.steps), spec.steps, "pre-training the tower"):
        scenes = [shapes.random_scene(rng, two=False) for _ in range(spec.batch_size)]
        ids = attribute_ids(scenes)
        features = tower(scene_pixels(scenes, rng, spec.image_size), output_hidden_states=True).hidden_states[
            -2
        ]
        texts = mixer(torch.cat([table(ids[:, i]) for i, table in enumerate(tables)], dim=-1))
        same = (ids[:, None] == ids[None]).all(-1).float()
        loss = contrastive_loss(
            head(features[:, 1:].flatten(1)), texts, same / same.sum(-1, keepdim=True), scale
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def build_tower(spec: ShapesTower, folder: Path) -> None:
    """Writes a pre-trained CLIP vision tower with its image processor's settings and `pretraining.json`."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=2 * spec.hidden_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        projection_dim=64,
    )
    with _seeded(spec.seed):
        tower = CLIPVisionModel(config)
        embeddings = next(m for m in tower.modules() if hasattr(m, "position_embedding")).position_embedding
        torch.nn.init.normal_(embeddings.weight, std=spec.position_std)
        losses = pretrain_tower(tower, spec)
    tower.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", preprocessor_config(spec.image_size))
    write_json(
        folder / "pretraining.json", {"loss": [round(loss, 4) for loss in losses], "steps": spec.steps}
    )


def preprocessor_config(size: int) -> dict[str, Any]:
    """The settings of CLIP's image processor, as in openai/clip-vit-large-patch14-336."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def build(spec: ShapesLlm | ShapesTower, folder: Path) -> None:
    """Writes the model folder that ``spec`` describes; ``folder`` is replaced only by a finished one."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if isinstance(spec, ShapesLlm):
        build_llm(spec, temporary)
    else:
        build_tower(spec, temporary)
    follow_umask(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Builds one model from the command line."""
    texts = {"spec": 'the model\'s spec as JSON, e.g. \'{"kind": "shapes_llm"}\''}
    options = command_line("demo.models", __doc__, texts, {"folder": "the model folder to write"}).parse_args(
        argv
    )
    build(
        read_spec(Annotated[ShapesLlm | ShapesTower, Field(discriminator="kind")], options.spec),
        options.folder,
    )


if __name__ == "__main__":
    main()
