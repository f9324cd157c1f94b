"""Kernels change how a step is computed and nothing else: attention by segments, recomputation, fusion."""

from __future__ import annotations

import functools
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import TrainerState

from llava_ext.data.assembly import Collator
from llava_ext.data.dataset import TrainingCollator
from llava_ext.data.images import ImagePreprocessor, normalised
from llava_ext.distributed.estimate import GIB, Decoder, Work, layout_of
from llava_ext.errors import TrainingError
from llava_ext.kernels import ATTENTIONS, Kernels, recomputed_layers
from llava_ext.model import attention
from llava_ext.model.interventions import FLAGS
from llava_ext.training import kernels, machine
from llava_ext.training.lora import add_adapters
from llava_ext.training.metrics import WINDOW, Metrics
from llava_ext.training.recompute import Estimate, choose_interval, what_fits
from llava_ext.training.throughput import Throughput, products_of
from tests.support.models import (
    ALONE,
    RECORDS,
    flags,
    make_batch,
    make_model,
    make_samples,
    one_thread,  # noqa: F401
    picture,
)
from tests.support.trainings import command_line, losses

ORDER_OF_SUMS, OTHER_FORMULA = 2e-6, 2e-5
INTERVENTIONS = {
    "vanilla": flags(),
    **{name: flags(name) for name in ALONE},
    "all": flags(*FLAGS),
    "published": flags("twoD_vision_embedding", published_behaviour=True),
}
SEVERAL = {
    "id": "several",
    "image": ["a.png", "b.png"],
    "conversations": [
        {"from": "human", "value": "<image>\n<image>\nWhich one is red?"},
        {"from": "gpt", "value": "The second one."},
    ],
}


MADE = []


@functools.cache
def model_of(name: str, **options):
    MADE.append(make_model(INTERVENTIONS[name], **options))
    return MADE[-1]


def batch_of(parts, packed, records=tuple(RECORDS), **options):
    """A batch as training makes it, without padding's mask and with all places known."""
    model, tokenizer, images = parts
    samples = [
        {"index": index, **sample}
        for index, sample in enumerate(make_samples(tokenizer, images, list(records)))
    ]
    for sample, record in zip(samples, records, strict=True):
        if isinstance(record.get("image"), list):
            sample["images"] = [sample["images"][0], sample["images"][0].flip(-1)]
    return TrainingCollator(Collator.for_model(model.config, tokenizer, packed=packed, **options))(samples)


def step(model, batch):
    """Loss and gradients of one micro-batch, with the trainer's choice of logits."""
    place = model.lm_head.weight.device
    given = {key: item.to(place) if torch.is_tensor(item) else item for key, item in batch.items()}
    for name in ("indices", "counts", "labels"):
        del given[name]
    places, targets = given.pop("predicting"), given.pop("targets")
    model.train().zero_grad(set_to_none=True)
    model.model.vision_tower.requires_grad_(False)
    logits = model(**given).logits.flatten(0, 1).index_select(0, places)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    return loss.detach(), {
        name: item.grad for name, item in model.named_parameters() if item.grad is not None
    }


def assert_equal(found, expected, bound):
    assert (found[0] - expected[0]).abs() <= bound
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert (gradient - expected[1][name]).abs().max() <= bound, name


def choose(model, kind, every=0):
    model.model.language_model.set_attn_implementation(kind)
    model.activation_checkpointing_disable()
    if every:
        model.activation_checkpointing_enable(every_n_layers=every)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a step is computed; models go back to the CPU, where others find them."""
    yield torch.device(request.param)
    if request.param != "cpu":
        for model, *_ in MADE:
            model.cpu()


@pytest.mark.parametrize("name", INTERVENTIONS)
@pytest.mark.parametrize("kind", ["sdpa", "varlen", "eager"])
def test_every_kernel_computes_the_plain_step(name, kind, device):
    """Attention x recomputation x packing, against sdpa, padded, with everything kept."""
    parts = model_of(name)
    model = parts[0].to(device)
    choose(model, "sdpa")
    expected = step(model, batch_of(parts, packed=False))
    for packed in (False, True):
        if packed and INTERVENTIONS[name].published_behaviour:
            continue  # the published table is one for all rows of a batch, so a row alone has another
        batch = batch_of(parts, packed)
        for every in (0, 1, 2):
            choose(model, kind, every)
            same_formula = kind != "eager" and device.type == "cpu"
            bound = ORDER_OF_SUMS if same_formula else OTHER_FORMULA
            assert_equal(step(model, batch), expected, bound)


@pytest.mark.parametrize(
    ("records", "options", "parts_options"),
    [
        ([SEVERAL, *RECORDS], {}, {}),
        (RECORDS[1:2], {}, {}),
        ([SEVERAL, *RECORDS], {"model_max_length": 75}, {}),
        ([*RECORDS, SEVERAL], {}, {"vision_feature_select_strategy": "full"}),
    ],
    ids=["several pictures", "text only", "cut inside a picture", "cls_patch"],
)
def test_segments_take_every_kind_of_sample(records, options, parts_options):
    parts = model_of("vanilla" if parts_options else "twoD_vision_embedding", **parts_options)
    model = parts[0]
    choose(model, "sdpa")
    expected = step(model, batch_of(parts, False, records, **options))
    choose(model, "varlen")
    assert_equal(step(model, batch_of(parts, True, records, **options)), expected, ORDER_OF_SUMS)


def test_places_that_the_collator_knows_are_those_that_the_model_finds():
    parts = model_of("all")
    model, batch = parts[0], batch_of(parts, True, [SEVERAL, *RECORDS])
    choose(model, "sdpa")
    given = {name: batch[name] for name in ("input_ids", "pixel_values", "position_ids", "labels")}
    counts = torch.tensor(batch["image_token_counts"])
    known = {name: batch[name] for name in ("image_places", "image_offsets", "image_token_counts")}
    with torch.no_grad():
        assert torch.equal(model(**given, **known).logits, model(**given, image_token_counts=counts).logits)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_segment_attention_is_causal_attention_of_each_segment(window, key_heads):
    """Grouped heads and a sliding window included, gradients too."""
    torch.manual_seed(0)
    lengths = [5, 1, 9]
    starts = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    inputs = [torch.randn(1, heads, 15, 8, requires_grad=True) for heads in (4, key_heads, key_heads)]
    found, _ = attention.segment_attention(
        None, *inputs, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=starts, max_length_q=9
    )
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    apart = torch.arange(15)[:, None] - torch.arange(15)[None]
    mask = (number[:, None] == number[None]) & (apart >= 0) & (apart < (window or 99))
    expected = scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(
        1, 2
    )
    assert torch.allclose(found, expected, atol=1e-6)
    wanted = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, inputs, wanted), torch.autograd.grad(expected, inputs, wanted), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-6)


def test_segments_are_refused_where_they_would_not_be_honoured():
    model, tokenizer, images = model_of("vanilla")
    choose(model, "varlen")
    batch = Collator.for_model(model.config, tokenizer)(make_samples(tokenizer, images))
    with pytest.raises(ValueError, match="load the model with sdpa"):
        model(**batch)
    choose(model, "sdpa")
    model.model.language_model.config.attention_dropout = 0.1
    try:
        with pytest.raises(TrainingError, match="attention_dropout"):
            attention.attend_by_segments(model.model.language_model)
    finally:
        model.model.language_model.config.attention_dropout = 0.0
    with pytest.raises(TrainingError, match="varlen: not known to be right for gpt2 models; known are Llama"):
        attention.check_family("gpt2")


@pytest.mark.parametrize(
    ("chosen", "machine", "sentence"),
    [
        (Kernels("flash_attention_2"), {}, "needs a CUDA GPU"),
        (Kernels("flash_attention_2"), {"gpu": True}, "needs bf16 or fp16"),
        (Kernels(fusion="liger"), {}, "liger has kernels for GPUs only"),
        (Kernels(fusion="compile"), {"engine": "zero3"}, "compile does not go together with zero3"),
        (Kernels(fusion="compile"), {"engine": "fsdp"}, "compile does not go together with fsdp"),
    ],
)
def test_what_does_not_go_together_is_said(chosen, machine, sentence):
    found = list(chosen.problems(**{"gpu": False, "half": False, "engine": "none"} | machine))
    assert len(found) == 1 and sentence in found[0][1]
    for attention_kind in ATTENTIONS:
        assert not list(Kernels(attention_kind, "liger", 2).problems(gpu=True, half=True, engine="zero3"))


def test_more_layers_than_the_model_has_are_refused_before_it_is_loaded(tmp_path, train_here):
    """Every Nth of fewer layers would be the first one alone."""
    status, log = train_here(command_line(2, tmp_path / "out", checkpoint_layers=100))
    assert status == 1 and "Loading weights" not in log
    assert re.search(r"--checkpoint_layers 100: this language model has (\d) layers; .* from 1 to \1", log), (
        log
    )


def test_a_missing_tool_of_a_fusion_is_said(monkeypatch):
    with pytest.raises(TrainingError, match="liger-kernel, which is missing here"):
        kernels.check_fusion("liger", gpu=True)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    with pytest.raises(TrainingError, match=r"needs a compiler, and none of c\+\+"):
        kernels.check_fusion("compile", gpu=False)


def test_liger_is_refused_for_language_models_that_it_may_not_fit():
    with pytest.raises(TrainingError, match="not known to be right for gpt2 models"):
        kernels.check_liger("gpt2")
    with pytest.raises(TrainingError, match="hidden_act gelu, and Liger's feed-forward layer knows silu"):
        kernels.check_liger("llama", "gelu")


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_levels_become_the_bits_of_normalised_pixels(aspect_ratio):
    """Pixels travel in 8 bits; the device makes of them what the preprocessing would have made."""
    _, _, processor = model_of("vanilla")
    preprocess = ImagePreprocessor.from_processor(processor, aspect_ratio)
    every_level = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)
    images = [picture(seed) for seed in (1, 2)]
    levels = torch.stack([preprocess.uint8(image) for image in images])
    table = torch.from_numpy(preprocess.table())
    assert torch.equal(normalised(levels, table), preprocess.batch(images))
    assert torch.equal(normalised(every_level[None], table)[0, :, 0], table)


def test_adapters_under_autocast_leave_activations_in_half_precision():
    """The same bits as with every activation cast to float32 and back; adapters stay in float32."""
    found = []
    for autocast in (False, True):
        model, tokenizer, images = make_model()
        batch = make_batch(model, tokenizer, images)
        model = add_adapters(model, rank=4, alpha=8, dropout=0.0, bias="none", autocast=autocast)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        down = model.get_base_model().model.language_model.layers[0].mlp.gate_proj.lora_A["default"]
        assert down.weight.dtype == torch.float32
        seen = []
        down.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(**batch).loss
        loss.backward()
        gradients = {name: item.grad for name, item in model.named_parameters() if item.grad is not None}
        found.append((loss.detach(), gradients, seen))
    (loss, gradients, cast), (other_loss, other_gradients, kept) = found
    assert cast == [torch.float32] and kept == [torch.bfloat16]
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


def test_dataset_workers_follow_the_cores(monkeypatch):
    for cores, processes, expected in ((16, 1, 8), (16, 4, 3), (2, 1, 1), (1, 1, 1)):
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert machine.free_cores() == expected


@pytest.mark.parametrize(("waited_s", "said"), [(0.1, False), (0.5, True)])
def test_waiting_for_samples_is_said_once(waited_s, said, tmp_path, capsys):
    metrics = Metrics(
        tmp_path, tensorboard=False, lines=False, throughput=Throughput(products_of(model_of("vanilla")[0]))
    )
    for _ in range(3 * WINDOW):
        metrics._notice_waiting(waited_s, 1.0, workers=2)
    assert capsys.readouterr().err.count("50% of the time") == said


def test_auto_recomputes_as_few_layers_as_fit():
    """Of the golden model's sizes; more room, fewer layers, from all to none."""
    model, _, _ = model_of("vanilla")
    training = SimpleNamespace(
        bf16=True, fp16=False, optim="adamw_torch", deepspeed=None, fsdp=None, fusion="none", world_size=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    found = [choose_interval(model, training, 20_000, room=room)[0] for room in range(10**6, 10**9, 10**7)]
    layers = model.config.text_config.num_hidden_layers
    recomputed = [recomputed_layers(interval or "none", layers) for interval in found]
    assert recomputed == sorted(recomputed, reverse=True)
    assert recomputed[0] == layers and recomputed[-1] == 0 and len(set(recomputed)) > 2
    assert "of up to 20000 tokens on 0.9 GiB" in choose_interval(model, training, 20_000, 10**9)[1]
    assert choose_interval(model, training, 1)[0] == 0


def test_after_too_little_memory_a_value_is_named_that_fits():
    """First more recomputation, then fewer samples; never what had too little already."""
    decoder = Decoder(layers=32, hidden=4096, intermediate=11008, vocabulary=32000)
    layout = layout_of(0, 1, half=True, engine=False, foreach=False, offload="none")
    estimate = Estimate(decoder, layout, 2**24, 6_700_000_000, Work(32 * 600, 0, learns=False))
    found = [what_fits(estimate, 0, 32, room * GIB) for room in (80, 48, 24, 16, 12)]
    assert [re.findall(r"--(?:per|check)\w+ \w+", text) for text in found] == [
        ["--checkpoint_layers 3"],  # as measured: 67 GiB
        ["--checkpoint_layers all"],
        ["--per_device_train_batch_size 16", "--checkpoint_layers all"],
        ["--per_device_train_batch_size 4", "--checkpoint_layers all"],
        [],
    ]
    assert "no micro-batch fits into 12.0 GiB" in found[-1]
    # the estimate was too low: what it said was too much all the same
    assert estimate.peak(1) < estimate.peak(3) < estimate.peak(0) < 200 * GIB
    assert "--checkpoint_layers" in what_fits(estimate, 0, 32, 200 * GIB)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "packed", "backend"),
    # The second runs what was traced as it stands, without the gradient's own graph: a quarter of the time.
    [("varlen", True, "aot_eager"), ("sdpa", False, "eager"), ("eager", True, "eager")],
)
def test_compiled_layers_compute_the_plain_step(kind, packed, backend, monkeypatch):
    """Traced by torch's compiler, every second layer recomputed, for lengths that change; the code that the
    compiler would write for this processor is left out, which takes minutes.
    """
    monkeypatch.setattr(kernels, "BACKEND", backend)
    parts = make_model(INTERVENTIONS["twoD_vision_embedding"])
    model = parts[0]
    batches = [batch_of(parts, packed, records) for records in (RECORDS, [SEVERAL, *RECORDS], [SEVERAL])]
    choose(model, kind, every=2)
    expected = [step(model, batch) for batch in batches]
    torch._dynamo.reset()
    kernels.fuse(model, "compile")
    watch = kernels.Recompilations(warm=1)
    state = TrainerState()
    for batch, plain in zip(batches, expected, strict=True):
        assert_equal(step(model, batch), plain, OTHER_FORMULA)
        watch.on_step_end(None, state, None)
    # A row of one sample has no mask, which is one more form of a layer, recomputed and not.
    assert watch.seen and watch.steps == len(batches) and watch.count <= (0 if kind == "varlen" else 2)


def test_a_model_without_layers_to_compile_is_told():
    """Not trained as if nothing had been asked for."""
    with pytest.raises(TrainingError, match="--fusion compile: found no layers"):
        kernels.fuse(torch.nn.Linear(2, 2), "compile")


@pytest.mark.slow
def test_a_training_by_segments_goes_on_with_the_same_bits(tmp_path, train_here, monkeypatch):
    """Packed, varlen, layers compiled and recomputed, the fused Adam; a training that goes on may change all
    of it.
    """
    monkeypatch.setattr(kernels, "BACKEND", "eager")
    chosen = {"attention": "varlen", "checkpoint_layers": 2, "pack": True, "optim": "adamw_torch_fused"}
    chosen |= {"fusion": "compile"}
    short = {"num_train_epochs": None, "max_steps": 4, "save_steps": 2, "preflight_samples": 8}
    argv = command_line(2, tmp_path / "whole", **short, **chosen)
    status, log = train_here(argv)
    assert status == 0, log
    for name in ("again", "changed"):
        kept = ("checkpoint-2", "run_identity.json")
        for item in kept[:1]:
            shutil.copytree(tmp_path / "whole" / item, tmp_path / name / item)
        shutil.copy(tmp_path / "whole" / kept[1], tmp_path / name / kept[1])
    status, log = train_here(command_line(2, tmp_path / "again", **short, **chosen))
    assert status == 0, log
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")[2:]
    config = (tmp_path / "whole" / "config.json").read_text()
    assert "varlen" not in config
    status, log = train_here(command_line(2, tmp_path / "changed", **short))
    assert status == 0 and "attn_implementation: 'varlen' when it was started, now None" in log, log
    for found, expected in zip(losses(tmp_path / "changed"), losses(tmp_path / "whole")[2:], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
