"""transformers' Trainer with LLaVA's loss, order of samples and parameter groups, and checkpoints that
survive kills.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import save_fsdp_optimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from .. import patches
from ..data.images import normalised
from ..data.sampler import EpochSampler
from ..data.skipping import EXAMPLES, Failure
from ..distributed.collectives import any_rank, barrier, from_all, world_size
from ..distributed.elastic import load_universal
from ..distributed.gather import gather
from ..distributed.offload import offloads_optimizer
from ..errors import NoVerdict, TrainingError
from . import claim, signals, states
from .arguments import LlavaTrainingArguments, sampling_strategy
from .optimizer import parameter_groups, trainable_names
from .step_report import StepReports

if TYPE_CHECKING:
    from .watchdogs import NoStep

TRAINED = "trained.safetensors"


class LlavaTrainer(Trainer):
    """Trains the parameters that ``requires_grad`` leaves on.

    Args:
        lengths: LLaVA's ``modality_lengths`` of the samples, ``(samples,)``.
        describe: text that names a sample, for messages; called with its index.
        pixel_table: the normalised value of each level of each channel, (3, 256).
        kwargs: as for :class:`transformers.Trainer`.
    """

    args: LlavaTrainingArguments
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *,
        lengths: np.ndarray,
        describe: Any,
        mm_projector_lr: float | None = None,
        pixel_table: np.ndarray,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if self.is_fsdp_enabled:
            self._split_by_layers()
        self.lengths = lengths
        self.describe = describe
        self.mm_projector_lr = mm_projector_lr
        self.pixel_table = torch.from_numpy(pixel_table).to(self.args.device)
        # Of the largest micro-batch; less where a survey has counted.
        self.largest_tokens = self.args.per_device_train_batch_size * self.args.model_max_length
        self.waited_s = 0.0
        self.watchdog: NoStep | None = None
        self.remove_callback(PrinterCallback)
        trackers = tuple(get_reporting_integration_callbacks(self.args.report_to))
        for callback in self.callback_handler.callbacks:
            if trackers and isinstance(callback, trackers):
                patches.tolerate_failures(callback)
        if self.args.loss_normalization == "micro_batch":
            # transformers would weight every token of the step alike; LLaVA averages the micro-batches'
            # means.
            self.model_accepts_loss_kwargs = False
        self.sampler: EpochSampler | None = None
        self.last_indices: list[int] = []
        self.reports = StepReports(self.name_samples)
        self.add_callback(self.reports)
        self.unsupervised_batches = 0
        self._predicting: torch.Tensor | None = None
        self.model.get_output_embeddings().register_forward_pre_hook(self._keep_predicting)
        self._save_root: Path | None = None
        self.saved_step = -1
        # A DeepSpeed checkpoint of another number of processes, converted; see elastic.py.
        self.universal: Path | None = None

    def _split_by_layers(self) -> None:
        """FSDP's units: the classes that the model names as not to be split, unless ``--fsdp_config`` names
        others.

        CLIP names a class of its text tower, which no LLaVA has and for which accelerate would stop.
        """
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            present = {type(module).__name__ for module in self.model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(present & set(self.model._no_split_modules or ()))

    # -- data ----------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        self.sampler = self._make_sampler()
        return self.sampler

    def _make_sampler(self) -> EpochSampler:
        args = self.args
        return EpochSampler(
            self.lengths,
            sampling_strategy(args),
            args.train_batch_size,
            args.world_size * args.gradient_accumulation_steps,
            args.seed if args.data_seed is None else args.data_seed,
        )

    def order_of_samples(self) -> list[int]:
        """The samples of the first epoch, in training order."""
        return self._make_sampler().order()

    def get_train_dataloader(self) -> Any:
        """As transformers', with workers that outlive a signal to the whole job."""
        loader = super().get_train_dataloader()
        patches.start_workers_within(loader, signals.blocked, signals.ignore_in_worker)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate does not reach the sampler through its own wrappers in every case.
        if self.sampler is not None:
            self.sampler.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As transformers'; where a sample of the coming step can't be used, on whatever rank, all ranks save
        what the last step has left, and stop.
        """
        before = torch.get_rng_state()  # an epoch's first batch draws the loader's seed
        began = time.monotonic()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.waited_s += time.monotonic() - began
        failures = [failure for batch in batches for failure in batch.pop("failures")]
        if any_rank(bool(failures), self.args.device):
            torch.set_rng_state(before)
            if self.state.global_step:
                self._save_checkpoint(self.model_wrapped, None)
            raise self._unusable([failure for found in from_all(failures) for failure in found])
        return batches, items

    def _unusable(self, failures: list[Failure]) -> TrainingError:
        """What is wrong with which records, and how to go on without them."""
        step = self.state.global_step
        lines = [failure.reason for failure in failures[:EXAMPLES]]
        if len(failures) > EXAMPLES:
            lines.append(f"and {len(failures) - EXAMPLES} more")
        saved = f"the state after step {step} is saved" if step else "there is no state to save"
        lines.append(f"Stopped before step {step + 1}; {saved}, and the same command goes on from there.")
        lasting = [failure.index for failure in failures if failure.repeats]
        if not lasting:
            return NoVerdict("\n".join(lines))
        return TrainingError("\n".join([*lines, self.train_dataset.advice(lasting)]))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it walks over all parameters at every step."""
        return 0

    # -- loss ----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """LLaVA's loss: cross entropy of the labels that count, from the logits of just these places.

        A micro-batch without any label counts as zero instead of poisoning the weights with NaN.
        """
        self.last_indices, counts = inputs.pop("indices"), inputs.pop("counts")
        del inputs["labels"]
        self._predicting, targets = inputs.pop("predicting"), inputs.pop("targets")
        if "pixel_values" in inputs:
            inputs["pixel_values"] = normalised(inputs["pixel_values"], self.pixel_table)
        outputs = model(**inputs)
        logits = outputs["logits"][0]
        if len(targets) == 0:
            self.unsupervised_batches += 1
            loss = logits.sum() * 0.0
        elif num_items_in_batch is None:
            loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        else:
            total = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            # Gradients are averaged over the ranks, the number of tokens is that of all ranks.
            loss = total / num_items_in_batch * world_size()
        self.reports.add(loss, counts, self.last_indices, last=self.accelerator.sync_gradients)
        return (loss, outputs) if return_outputs else loss

    def _keep_predicting(self, head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Hands the LLM's head only the places whose next token is a label: (batch, tokens, hidden) -> (1,
        labels, hidden).
        """
        if self._predicting is None:
            return args
        chosen = args[0].flatten(0, 1).index_select(0, self._predicting.to(args[0].device))
        self._predicting = None
        return (chosen[None], *args[1:])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers', with the counts of all ranks since the last one."""
        if "loss" in logs:
            logs |= self.reports.take_counts() | {"data_wait_s": self.waited_s}
            self.waited_s = 0.0
        super().log(logs, start_time)

    def last_samples(self) -> list[str]:
        """The samples of the last micro-batch, one a line."""
        return self.name_samples(self.last_indices)

    def name_samples(self, indices: Sequence[int]) -> list[str]:
        """Samples by their indices, one a line."""
        return [f"  {self.describe(index)}" for index in indices]

    # -- optimizer -----------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As transformers', with LLaVA's groups."""
        if self.optimizer is None:
            target = self.model if model is None else model
            groups = parameter_groups(
                target, self.args.weight_decay, self.mm_projector_lr, self.args.vision_tower_lr
            )
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = kind(
                [{k: v for k, v in group.items() if k != "names"} for group in groups], **settings
            )
        return self.optimizer

    # -- saving --------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._save_root or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes the full state beside, and gives it its name when it is complete."""
        step = self.state.global_step
        if step == self.saved_step:
            return
        output_dir = Path(self.args.output_dir)
        root = states.staging(output_dir, step)
        if self.args.should_save:
            claim.check_claim(output_dir)
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
        barrier()
        self._save_root = root
        try:
            super()._save_checkpoint(model, trial)
            barrier()
            files = self._list_together(root / f"checkpoint-{step}")
            if self.args.should_save:
                self._seal(root, output_dir, step, files)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise self._save_failure(root, error) from error
        finally:
            self._save_root = None
        barrier()
        self.saved_step = step
        if self.watchdog is not None:
            self.watchdog.beat()

    def _list_together(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and CRC of every file of a checkpoint. Each rank reads its share: one alone would need minutes
        for a large state, in the time between a signal and the job's end.

        Every rank says which files it sees: on a shared file system a machine may see another's only later.
        """
        seen = from_all(states.file_names(folder))
        mine = states.shares(seen)[dist.get_rank() if world_size() > 1 else 0]
        parts = from_all(states.listing(folder, mine))
        return {name: facts for part in parts for name, facts in part.items()}

    def _seal(self, root: Path, output_dir: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
        args = self.args
        facts = {
            "world_size": args.world_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "engine": self.engine,
        }
        name = f"checkpoint-{step}"
        states.seal(root / name, output_dir / name, step, files, **facts)
        shutil.rmtree(root, ignore_errors=True)
        states.prune(output_dir, args.save_total_limit)

    def _save_failure(self, root: Path, error: Exception) -> NoVerdict:
        shutil.rmtree(root, ignore_errors=True)
        good = next(
            (item for item in states.checkpoints(root.parent) if not item.problem(contents=False)), None
        )
        kept = f"the last good one is {good.path}" if good else "there is no earlier one"
        free = shutil.disk_usage(root.parent).free / 2**30
        return NoVerdict(
            f"{root.name.removeprefix(states.STAGING)}: could not be saved: {error}\n"
            f"{kept}; {free:.1f} GiB are free in {root.parent}. Make room and start the same command again."
        )

    @property
    def engine(self) -> str:
        """What owns the optimizer's state, because checkpoints of different engines can't be mixed."""
        if self.is_deepspeed_enabled:
            plugin = self.accelerator.state.deepspeed_plugin
            offload = "-offload" if offloads_optimizer(plugin.deepspeed_config) else ""
            return f"deepspeed-zero{plugin.zero_stage}{offload}"
        return "fsdp" if self.is_fsdp_enabled else "ddp"

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As transformers'; DeepSpeed's engine, which exists by now, is told to leave frozen weights out
        of its checkpoints.
        """
        engine = getattr(getattr(self.accelerator, "deepspeed_engine_wrapped", None), "engine", None)
        if engine is not None:
            patches.use_checkpointing(engine, self._load_engine)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_engine(self, engine: Any, folder: str, **kwargs: Any) -> Any:
        """DeepSpeed's state from ``folder``, or from what was made of it for this number of processes."""
        if self.universal is None:
            loaded = type(engine).load_checkpoint(engine, folder, **kwargs | {"load_module_strict": False})
        else:
            loaded = load_universal(engine, self.universal)
            barrier()
            if self.args.should_save:
                shutil.rmtree(self.universal, ignore_errors=True)
        patches.replay_steps(engine.optimizer.optimizer)
        return loaded

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers', but with FSDP no second file of all weights: ``save_model`` writes those that
        train.
        """
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the weights that train, whole, under their names in memory, and the config. Every rank must
        call.

        Not with DeepSpeed, whose own files hold them: nobody would read these, and one rank would write 13.5
        GB more.
        """
        model = self.plain_model
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            model.config.save_pretrained(folder)
        if self.is_deepspeed_enabled:
            return
        tensors = gather(model, set(trainable_names(model)), self.args.should_save)
        if self.args.should_save:
            save_file(tensors, folder / TRAINED, metadata={"format": "pt"})

    @property
    def plain_model(self) -> Any:
        """The model without the wrappers of DDP or DeepSpeed; FSDP2 has none."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restores the weights that train; all others come from the folders that the command line names."""
        target = self.plain_model
        state = load_file(Path(resume_from_checkpoint) / TRAINED)
        missing = set(trainable_names(target)) - state.keys()
        if self.is_fsdp_enabled:
            # Every rank takes its part of the whole tensors. Imported here: a second that others need not
            # wait.
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            whole = StateDictOptions(full_state_dict=True, strict=False)
            result = set_model_state_dict(target, dict(state), options=whole)
        else:
            result = target.load_state_dict(state, strict=False)
        if missing or result.unexpected_keys:
            raise TrainingError(
                f"{resume_from_checkpoint}: does not fit this model: missing {sorted(missing)[:5]},"
                f" unexpected {result.unexpected_keys[:5]}; the training code has changed, start in a new"
                " --output_dir"
            )

    def gathered_state(self) -> dict[str, torch.Tensor]:
        """All weights under their names in memory, whole, on rank 0 (elsewhere empty). Every rank must
        call.
        """
        model = self.plain_model
        state = gather(model, {name for name, _ in model.named_parameters()}, self.args.should_save)
        if not self.args.should_save:
            return {}
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in state:  # a buffer, or a tied parameter's second name
                whole = state.get(first.get(id(tensor), ""))
                state[name] = tensor.detach().cpu() if whole is None else whole
        return state
