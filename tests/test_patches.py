"""Each change to a library, beside what the library does without it: a test that fails says that a change
can go.
"""

from __future__ import annotations

import inspect
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, TrainerCallback
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from llava_ext import patches
from llava_ext.training import signals
from tests.support import warm
from tests.support.trainings import REPOSITORY, environment


@pytest.fixture
def python(tmp_path):
    """What a script prints in a process of its own, its errors too (tests/support/warm.py)."""

    def run(script: str, *arguments: str, **changes: str) -> str:
        path, log = tmp_path / "script.py", tmp_path / "script.log"
        path.write_text(script)
        log.unlink(missing_ok=True)
        warm.run(str(path), arguments, log, REPOSITORY, environment(**changes), timeout=200)
        return log.read_text()

    return run


@pytest.fixture
def both(python):
    """What a script prints without a patch and with it."""

    def run(patch: str, script: str, *arguments: str, **changes: str) -> tuple[str, str]:
        head = "from llava_ext import patches\n"
        return (
            python(head + script, *arguments, **changes),
            python(f"{head}patches.{patch}()\n{script}", *arguments, **changes),
        )

    return run


# -- accelerate -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accelerate_imports_deepspeed_to_look_at_a_model(both):
    script = (
        "import sys, torch, accelerate.utils.other as other\n"
        "other.extract_model_from_parallel(torch.nn.Linear(1, 1))\n"
        "print('loaded:', 'deepspeed' in sys.modules)"
    )
    without, ours = both("keep_deepspeed_out", script)
    assert "loaded: True" in without and "loaded: False" in ours


@pytest.mark.slow
def test_accelerate_has_no_fsdp_on_the_cpu(python):
    script = (
        "import sys, torch.distributed as dist\n"
        "from accelerate import Accelerator, PartialState\n"
        "from accelerate.utils import FullyShardedDataParallelPlugin\n"
        "PartialState(cpu=True)\n"
        "if sys.argv[1] == 'patched': patches.allow_fsdp_on_cpu()\n"
        "plugin = FullyShardedDataParallelPlugin(fsdp_version=2)\n"
        "print('kind:', Accelerator(cpu=True, fsdp_plugin=plugin).distributed_type.name)\n"
        "dist.destroy_process_group()"
    )
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    head = "from llava_ext import patches\n"
    assert "kind: MULTI_CPU\n" in python(head + script, "as it is", **alone)
    assert "kind: FSDP\n" in python(head + script, "patched", **alone)


# -- transformers -----------------------------------------------------------------------------------------


def test_transformers_knows_of_zero3_wherever_a_model_is_built():
    from transformers.integrations import deepspeed

    config = (
        PreTrainedConfig()
    )  # something that can be referred to weakly, and answers as a DeepSpeed config does
    config.is_zero3 = lambda: True
    deepspeed.set_hf_deepspeed_config(config)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with patches.without_zero3():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


class BrittleCallback(TrainerCallback):
    """A tracker whose connection goes away."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, *args, **kwargs):
        raise ValueError("no key")

    def on_log(self, *args, **kwargs):
        self.seen.append("log")
        raise ConnectionResetError("gone")

    def on_train_end(self, *args, **kwargs):
        self.seen.append("end")


@pytest.fixture
def tracker():
    """A tracker, and a handler that hands it the events as the trainer does."""
    brittle = BrittleCallback()
    return brittle, CallbackHandler([brittle], None, None, None, None)


def test_a_tracker_that_fails_ends_transformers_training(tracker):
    _, handler = tracker
    with pytest.raises(ConnectionResetError):
        handler.on_log(None, TrainerState(), TrainerControl(), {"loss": 1.0})


def test_a_tracker_that_fails_is_said_once_and_gets_nothing_more(tracker, capsys):
    brittle, handler = tracker
    patches.tolerate_failures(brittle)
    for _ in range(2):
        handler.on_log(None, TrainerState(), TrainerControl(), {"loss": 1.0})
    handler.on_train_end(None, TrainerState(), TrainerControl())
    assert brittle.seen == ["log"]
    assert (
        capsys.readouterr().err
        == "llava_ext: Brittle has failed (ConnectionResetError: gone) and gets nothing more; "
        "metrics.jsonl has every step\n"
    )


def test_a_tracker_that_can_not_start_stops_the_training(tracker):
    brittle, handler = tracker
    patches.tolerate_failures(brittle)
    with pytest.raises(ValueError, match="no key"):
        handler.on_train_begin(None, TrainerState(), TrainerControl())


# -- torch ------------------------------------------------------------------------------------------------


class Signalling(Dataset):
    """Its third sample sends SIGUSR1 to whoever reads it, as Slurm does to every process of a job."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return index


@pytest.mark.slow
def test_a_signal_ends_torchs_workers(python):
    script = (
        "import sys\n"
        "from llava_ext.training import signals\n"
        "from tests.test_patches import Signalling, DataLoader\n"
        "loader = DataLoader(Signalling(), batch_size=1, num_workers=1, multiprocessing_context='fork')\n"
        "if sys.argv[1] == 'patched':\n"
        "    patches.start_workers_within(loader, signals.blocked, signals.ignore_in_worker)\n"
        "print([int(batch) for batch in loader])"
    )
    head = "from llava_ext import patches\n"
    assert "[0, 1, 2, 3]" not in python(head + script, "as it is")
    assert "[0, 1, 2, 3]" in python(head + script, "patched")


@pytest.mark.parametrize("shielded", [False, True])
def test_a_worker_can_be_hit_before_torchs_own_hook_runs(shielded):
    """What the context around the start is for: the mask of signals is inherited, a hook would come too
    late.
    """
    loader = DataLoader(Signalling(), batch_size=1, num_workers=1, multiprocessing_context="fork")
    start, masks = loader._get_iterator, []

    def look():
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return start()

    loader._get_iterator = look
    if shielded:
        patches.start_workers_within(loader, signals.blocked, signals.ignore_in_worker)
    workers = iter(loader)
    assert (signal.SIGUSR1 in masks[0]) == shielded
    workers._shutdown_workers()


@pytest.mark.slow
def test_compiled_code_has_random_numbers_of_its_own(python):
    """With the patch the same channels are left out, and the generator ends where it would."""
    script = (
        "import torch\n"
        "from llava_ext import patches\n"
        "def step(drop):\n"
        "    torch.manual_seed(5)\n"
        "    return torch.cat([drop(torch.ones(64)), torch.rand(1)])\n"
        "def equal():\n"
        "    drop = lambda x: torch.nn.functional.dropout(2 * x, 0.5)\n"
        "    return torch.equal(step(drop), step(torch.compile(drop)))\n"
        "print('equal:', equal())\n"
        "patches.draw_masks_as_uncompiled()\n"
        "torch._dynamo.reset()\n"
        "print('then:', equal())\n"
    )
    assert "equal: False\nthen: True\n" in python(script)


# -- DeepSpeed --------------------------------------------------------------------------------------------


class Evil:
    """Unpickling it creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_deepspeed_unpickles_whatever_its_files_name(tmp_path, python):
    torch.save({"state": Evil(tmp_path / "ran")}, tmp_path / "state.pt")
    script = (
        "import sys\n"
        "from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine\n"
        "TorchCheckpointEngine().load(sys.argv[1])"
    )
    head = "from llava_ext import patches\n"
    python(head + script, str(tmp_path / "state.pt"))
    assert (tmp_path / "ran").is_dir()
    (tmp_path / "ran").rmdir()
    text = python(f"{head}patches.read_only_tensors()\n{script}", str(tmp_path / "state.pt"))
    assert "Weights only load failed" in text and not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("attribute", "read"), [("gradients", True), ("mro", False)])
def test_a_stage_is_read_however_this_or_another_python_has_pickled_it(attribute, read, tmp_path, python):
    """Python 3.11.0 to 3.11.3 write `getattr(ZeroStageEnum, "gradients")`; any other attribute is refused."""
    torch.save({"zero_stage": Attribute(attribute)}, tmp_path / "state.pt")
    script = (
        "import sys, torch\n"
        "from llava_ext import patches\n"
        "patches.read_only_tensors()\n"
        "print(repr(torch.load(sys.argv[1], weights_only=False)['zero_stage']))"
    )
    text = python(script, str(tmp_path / "state.pt"))
    assert ("ZeroStageEnum.gradients" in text) == read
    assert read or "UnpicklingError" in text


class Attribute:
    """Is pickled as an attribute of DeepSpeed's enumeration."""

    def __init__(self, name: str):
        self.name = name

    def __reduce__(self):
        from deepspeed.runtime.zero.config import ZeroStageEnum

        return getattr, (ZeroStageEnum, self.name)


@pytest.mark.slow
def test_deepspeed_would_compile_an_operator_on_the_cpu(tmp_path, both):
    """Asked for at the start of every process group; the compiler is one that leaves a trace."""
    script = (
        "from deepspeed.comm.torch import build_shm_op\n"
        "try: print('operator:', build_shm_op())\n"
        "except Exception as error: print('tried:', type(error).__name__)"
    )
    changes = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/nowhere/c++"}
    without, ours = both("keep_shared_memory_out", script, **changes)
    assert "tried: " in without and "operator: None" in ours


@pytest.mark.slow
def test_deepspeed_saves_frozen_weights_too_unless_it_is_told():
    from deepspeed.runtime.engine import DeepSpeedEngine

    saved = inspect.signature(DeepSpeedEngine.save_checkpoint).parameters["exclude_frozen_parameters"]
    assert saved.default is False
