"""The launcher's parts: the command for each kind of job, who owns a training, when to give up, what a
node lacks.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

import llava_ext
from tests.support.workspace import ROOT
from workflow_scripts import step as step_module
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.config.mixtures import MixtureSpec
from workflow_scripts.config.models import ModelSection
from workflow_scripts.config.stages import StageSpec
from workflow_scripts.io import Hiccup, UserError, user_errors, write_json
from workflow_scripts.launch import attempts, command, ownership, preflight, step, verdicts
from workflow_scripts.launch.command import (
    Inputs,
    Nodes,
    tracking_environment,
    training_command,
    training_environment,
    training_flags,
)
from workflow_scripts.launch.ownership import Ownership
from workflow_scripts.launch.process import Training
from workflow_scripts.launch.processes import process_start
from workflow_scripts.launch.retries import spare_vain_attempts
from workflow_scripts.launch.step import complete
from workflow_scripts.plan.plan import read_plan
from workflow_scripts.plan.resources import resources_of
from workflow_scripts.status.read import last_metrics
from workflow_scripts.step import REPEATS, run_step


@pytest.fixture()
def spec():
    plan = read_plan([ROOT / "config/config.yaml"])
    return complete(plan.training_spec("finetune", plan.run("finetune", "normalize_multilayer").name))


def flags_of(spec, tmp_path):
    inputs = Inputs(
        tmp_path / "samples.json", tmp_path / "llm", tmp_path / "tower", tmp_path / "mm_projector.safetensors"
    )
    return training_flags(spec, inputs, tmp_path / "state")


def test_the_flags_are_understood_by_the_training_command(spec, tmp_path):
    """Every flag that the launcher composes exists, and each value of the configuration arrives."""
    from llava_ext.training.arguments import parse

    for name in ("samples.json", "mm_projector.safetensors"):
        (tmp_path / name).write_text("[]")
    for name in ("llm", "tower"):
        (tmp_path / name).mkdir()
    spec["recipe"] |= {
        "mm_projector_lr": 1e-4,
        "lora": {"r": 8, "alpha": 16, "dropout": 0.1, "bias": "none"},
        "max_grad_norm": 0.5,
        "report_to": ["tensorboard", "wandb"],
    }
    spec["compute"] |= {
        "packing": True,
        "kernels": {"attention": "eager", "fusion": "compile", "checkpoint_layers": 2},
        "dataloader_workers": 2,
    }
    found = parse(flags_of(spec, tmp_path))
    training, recipe = found.training, spec["recipe"]
    assert found.interventions.to_dict() | spec["interventions"] == found.interventions.to_dict()
    assert found.interventions.multilayer_layers == (1, 2, 3)
    rates = ("learning_rate", "weight_decay", "adam_beta2", "mm_projector_lr", "max_grad_norm")
    for name in (*rates, "max_steps", "seed", "model_max_length", "save_steps"):
        assert getattr(training, name) == recipe[name], name
    assert training.group_by_modality_length and training.lora_enable and training.lora_r == 8
    assert (
        training.per_device_train_batch_size * training.gradient_accumulation_steps
        == recipe["global_batch_size"]
    )
    assert found.model.version == "v1" and found.data.image_aspect_ratio == "pad" and found.data.pack
    assert found.model.attention == "eager" and training.use_cpu
    assert training.fusion == "compile" and training.activation_checkpointing
    assert training.activation_checkpointing_kwargs == {"every_n_layers": 2}
    assert training.own_tensorboard and training.report_to == ["wandb"] * preflight.importable("wandb")
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.05}


def test_one_process_is_plain_python_several_are_torchrun_and_nodes_are_srun():
    flags = ["--seed", "1"]
    one = training_command(flags, ComputeSpec(), Nodes(), "python")
    assert one == ["python", "-m", "llava_ext.train", "--seed", "1"]
    eight = training_command(flags, ComputeSpec(gpus_per_node=8, parallel="zero2"), Nodes(), "python")
    assert (
        eight[:4] == ["python", "-m", "torch.distributed.run", "--nproc-per-node=8"]
        and "--standalone" in eight
    )
    compute = ComputeSpec(gpus_per_node=4, nodes=2, parallel="zero3", cpus=32)
    two = training_command(flags, compute, Nodes(("n1", "n2"), "n1", 23456), "python")
    assert two[:5] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=32"]
    inner = two[-1]
    for part in (
        "--nproc-per-node=4",
        "--nnodes=2",
        "--node-rank=$SLURM_NODEID",
        "--master-addr=n1",
        "--master-port=23456",
    ):
        assert part in inner


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_global_batch_stays_whatever_the_number_of_processes(spec, tmp_path, processes):
    spec["compute"] |= {
        "processes_per_node": processes,
        "parallel": "ddp" if processes > 1 else "none",
        "per_device_batch_size": 3,
    }
    flags = flags_of(spec, tmp_path)
    value = {
        name: int(flags[flags.index(f"--{name}") + 1])
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    }
    assert value["per_device_train_batch_size"] * value["gradient_accumulation_steps"] * processes == 24


def test_trainings_are_offline_and_have_one_thread_pool_each():
    found = training_environment(
        {"HF_HUB_OFFLINE": "0", "HOME": "/h"},
        ComputeSpec(cpus=8, processes_per_node=2, parallel="ddp"),
    )
    assert found["HF_HUB_OFFLINE"] == "1" and found["OMP_NUM_THREADS"] == "4" and found["HOME"] == "/h"


def test_gpus_get_an_allocator_for_batches_of_ever_other_widths_unless_one_is_chosen():
    gpu = ComputeSpec(gpus_per_node=1)
    assert training_environment({}, gpu)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    chosen = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}
    assert training_environment(chosen, gpu)["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:512"
    assert "PYTORCH_ALLOC_CONF" not in training_environment({"PYTORCH_CUDA_ALLOC_CONF": "x"}, gpu)
    assert "PYTORCH_ALLOC_CONF" not in training_environment({}, ComputeSpec())


def test_all_attempts_are_one_run_of_a_tracker(spec, tmp_path):
    assert tracking_environment(spec, tmp_path / "state", 1.5) == {}
    assert "--run_name" not in flags_of(spec, tmp_path)
    spec["recipe"]["report_to"] = ["tensorboard", "wandb"]
    found = tracking_environment(spec, tmp_path / "state", 1.5)
    assert found == tracking_environment(spec, tmp_path / "state", 1.5)
    assert found["WANDB_MODE"] == "offline" and found["WANDB_DIR"] == str(tmp_path / "state")
    others = [
        tracking_environment(spec, tmp_path / "other", 1.5),
        tracking_environment(spec, tmp_path / "state", 2),
    ]
    assert found["WANDB_RUN_ID"] not in [other["WANDB_RUN_ID"] for other in others]
    flags = flags_of(spec, tmp_path)
    assert flags[flags.index("--run_name") + 1] == f"finetune-{spec['run']}-state"


def test_what_a_job_asks_for():
    assert resources_of(ComputeSpec())["gres"] is None
    one = resources_of(ComputeSpec(gpus_per_node=8, parallel="zero2", mem_mb=1000, runtime_min=60))
    assert (one["gres"], one["nodes"], one["mpi"], one["tasks_per_gpu"], one["train_slots"]) == (
        "gpu:8",
        1,
        None,
        0,
        1,
    )
    two = resources_of(
        ComputeSpec(nodes=2, gpus_per_node=4, gres="gpu:a100:4", parallel="zero3", save_before_end_s=600)
    )
    assert (two["gres"], two["mpi"], two["tasks"]) == ("gpu:a100:4", "srun", 2)
    assert two["slurm_extra"] == "--signal=TERM@600 --open-mode=append --ntasks-per-node=1"


# ---------------------------------------------------------------- ownership

SLOW_TO_END = (
    "import signal, sys, time; signal.signal(15, lambda *a: (time.sleep(0.5), sys.exit(0))); print('up',"
    " flush=True); time.sleep(900)"
)


def owner_file(state, **changes):
    state.mkdir(exist_ok=True)
    mine = {
        "host": socket.gethostname(),
        "pid": 1,
        "start": "x",
        "job": "",
        "trainer": None,
        "trainer_start": None,
    }
    (state / "owner.json").write_text(json.dumps(mine | changes))


def test_a_dead_owner_is_replaced_and_the_claim_given_up(tmp_path):
    owner_file(tmp_path, pid=999999)
    owner = Ownership(tmp_path)
    owner.claim()
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()
    owner.release()
    assert not (tmp_path / "owner.json").exists()


def test_a_reused_pid_is_not_taken_for_the_owner(tmp_path):
    with subprocess.Popen([sys.executable, "-c", SLOW_TO_END], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        owner_file(tmp_path, pid=other.pid, start="another process of long ago")
        Ownership(tmp_path).claim()
        assert other.poll() is None
        other.kill()


def test_a_living_owner_may_save_before_it_is_replaced(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", SLOW_TO_END], stdout=subprocess.PIPE)
    other.stdout.readline()
    owner_file(tmp_path, pid=other.pid, start=process_start(other.pid))
    begin = time.monotonic()
    Ownership(tmp_path).claim()
    assert time.monotonic() - begin >= 0.4
    assert other.wait() == 0, "it was not given the time to end by itself"


@pytest.mark.parametrize(
    "who", [{"host": "elsewhere"}, {"host": "elsewhere", "job": "7"}], ids=["no Slurm", "job"]
)
def test_an_owner_that_nobody_can_ask_is_watched(tmp_path, monkeypatch, who):
    """It is on another machine, and there is no Slurm, or none that answers: it keeps the training while
    it shows life.
    """
    monkeypatch.setenv("SLURM_CONF", "/dev/null")
    monkeypatch.setattr(ownership, "SILENCE_S", 2.0)
    monkeypatch.setattr(ownership, "BEAT_S", 0.1)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.2)))
    living = Ownership(tmp_path)
    living.mine |= who
    living.claim()
    with pytest.raises(UserError, match="is still computing this training"):
        Ownership(tmp_path).claim()
    assert json.loads((tmp_path / "owner.json").read_text())["host"] == "elsewhere"

    living.released.set()  # as kill -9 does
    Ownership(tmp_path).claim()
    assert json.loads((tmp_path / "owner.json").read_text())["host"] == socket.gethostname()


def test_a_requeued_job_takes_over_from_itself_on_another_machine(tmp_path, monkeypatch):
    """Slurm starts a job again only after it has ended, or after its machine was given up."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    owner_file(tmp_path, host="elsewhere", job="12")
    Ownership(tmp_path).claim()
    assert json.loads((tmp_path / "owner.json").read_text())["host"] == socket.gethostname()


def test_a_training_outlives_nobody(tmp_path):
    """A launcher that is killed takes its training with it: it gets the signal to save."""
    code = (
        "import sys, time; sys.path.insert(0, {root!r});"
        "from pathlib import Path; from workflow_scripts.launch.process import Training;"
        "t = Training([sys.executable, '-c', {slow!r}], {{}}, Path({log!r}), 'x', False, ''); t.start();"
        "print(t.pid, flush=True); time.sleep(900)"
    ).format(root=str(ROOT), slow=SLOW_TO_END, log=str(tmp_path / "log"))
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pid = int(launcher.stdout.readline())
    deadline = time.monotonic() + 300
    while "up" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    while process_start(pid) is not None:
        assert time.monotonic() < deadline + 300
        time.sleep(0.05)


def test_signals_to_the_launcher_reach_all_processes_of_a_training(tmp_path):
    tree = (
        f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {SLOW_TO_END!r}],"
        " start_new_session=True))"
    )
    with Training(
        [sys.executable, "-c", tree], dict(os.environ), tmp_path / "log", "x", True, ""
    ) as training:
        deadline = time.monotonic() + 300
        while "up" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        assert training.wait() == 0
        os.kill(os.getpid(), signal.SIGTERM)  # while its end is recorded: no reason to end without that


def test_a_signal_before_the_training_is_started_reaches_it(tmp_path):
    training = Training(
        [sys.executable, "-c", SLOW_TO_END], dict(os.environ), tmp_path / "log", "x", False, ""
    )
    training._forward(signal.SIGTERM, None)
    with training:
        assert training.wait() == -signal.SIGTERM  # it has no handler of its own yet


# ---------------------------------------------------------------- attempts


def test_attempts_without_progress_are_stopped_and_progress_starts_the_count_again(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for _ in range(2):
        row = attempts.begin(tmp_path, attempts.read_attempts(tmp_path))
        attempts.end(tmp_path, row, "failed (1)")
    attempts.refuse_if_stuck(tmp_path, attempts.read_attempts(tmp_path), 3)
    killed = attempts.begin(tmp_path, attempts.read_attempts(tmp_path))  # no end is recorded
    assert (tmp_path / killed["log"]).is_file()  # who reads the row can read the log at once
    with pytest.raises(
        UserError, match=r"the last 3 attempts \(failed \(1\), failed \(1\), killed\)"
    ) as caught:
        attempts.refuse_if_stuck(tmp_path, attempts.read_attempts(tmp_path), 3)
    assert "attempt-003.log" in str(caught.value)
    saved = tmp_path / "checkpoint-50"
    saved.mkdir()
    (saved / "complete.json").write_text("{}")
    attempts.refuse_if_stuck(tmp_path, attempts.read_attempts(tmp_path), 3)


def test_preemptions_before_the_first_save_are_not_taken_for_a_fault(tmp_path, monkeypatch):
    """Slurm ends a job and starts it again under the same number; that is let pass many times, but not for
    ever.
    """
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for _ in range(3 * attempts.REQUEUED_IN_VAIN):
        attempts.refuse_if_stuck(tmp_path, attempts.read_attempts(tmp_path), 3)
        attempts.begin(tmp_path, attempts.read_attempts(tmp_path))
    with pytest.raises(UserError, match=r"the last 30 attempts .* time between preemptions"):
        attempts.refuse_if_stuck(tmp_path, attempts.read_attempts(tmp_path), 3)
    monkeypatch.setenv("SLURM_JOB_ID", "13")  # another job: the last attempt of the old one did fail, once
    ended, requeued = attempts.split_requeued(attempts.read_attempts(tmp_path), "13")
    assert (len(ended), len(requeued)) == (1, 29)


def test_half_written_lines_are_left_out(tmp_path):
    attempts.begin(tmp_path, [])
    with (tmp_path / "attempts.jsonl").open("a") as stream:
        stream.write('{"attempt": 2, "star')
    assert [row["attempt"] for row in attempts.read_attempts(tmp_path)] == [1]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in last_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


# ---------------------------------------------------------------- preflight


def test_a_machine_says_everything_it_lacks(tmp_path):
    token = tmp_path / "token"
    token.write_text("1")
    expected = preflight.expectations(
        ComputeSpec(gpus_per_node=99, parallel="ddp"),
        [tmp_path, tmp_path / "absent"],
        "nosuch.invalid",
        token,
    )
    expected["versions"]["torch"] = "0.1"
    token.write_text("2")
    found = "\n".join(preflight.problems_here(expected))
    for part in (
        "99 are needed",
        "torch is",
        "absent can't be seen here",
        "not shared",
        "nosuch.invalid, can't be resolved",
    ):
        assert part in found


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_trained(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "notrackerofthisname").mkdir()  # a folder of its name is not the package
    spec["recipe"]["report_to"] = ["tensorboard", "notrackerofthisname"]
    with pytest.raises(UserError) as caught:
        preflight.check_all(spec, ComputeSpec(), Nodes(), [], tmp_path)
    message = str(caught.value)
    for part in (
        "stages.finetune.report_to names notrackerofthisname",
        sys.executable,
        "pip install notrackerofthisname",
        "take it out of report_to",
    ):
        assert part in message
    assert "names tensorboard" not in message


def test_a_job_says_how_to_go_on_without_a_machine_that_lacks_something(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURMD_NODENAME", "n07")
    with pytest.raises(
        UserError, match=r"(?s)n07 can't .*absent.*--slurm-exclude-failed-nodes n07$"
    ) as caught:
        preflight.check_all(spec, ComputeSpec(), Nodes(), [tmp_path / "absent"], tmp_path)
    assert "\nTo go on without" in str(caught.value)
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(UserError, match=r"must lie on a file system that all machines share$"):
        preflight.check_all(spec, ComputeSpec(), Nodes(), [tmp_path / "absent"], tmp_path)
    nodes, done = Nodes(("n1", "n2", "n3"), "n1", 20000, "17"), subprocess.CompletedProcess([], 1, "", "")
    for name, problems in (("n1", []), ("n3", ["sick"])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"problems": problems}))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(UserError, match=r"(?s)n2: no answer\n  n3: sick.*exclude-failed-nodes n2,n3$"):
        preflight._judge(nodes, tmp_path, done)


def test_gpus_that_the_driver_lists_and_torch_cannot_use_are_no_gpus(tmp_path, monkeypatch):
    """A torch for another driver, or for the CPU: the training would run on the CPU for days."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU 0: H200 (UUID: GPU-a)\\nGPU 1: H200 (UUID: GPU-b)\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on a machine with GPUs: torch may use none
    (found,) = preflight.gpu_problems(2, "fp32")
    assert found.startswith("0 GPUs are visible, 2 are needed (torch ")
    assert "nvidia-smi lists 2" in found and "CUDA_VISIBLE_DEVICES=" in found
    assert preflight.gpu_problems(0, "fp32") == []


def test_a_gpu_without_bfloat16_and_one_that_hangs_are_named(monkeypatch):
    monkeypatch.setattr(preflight, "visible_gpus", lambda: preflight.Gpus(("V100",) * 2))
    assert preflight.gpu_problems(2, "fp16") == []
    assert preflight.gpu_problems(2, "bf16") == [
        "precision: bf16 can't be computed by V100; set precision: fp16"
    ]
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "ASK_TORCH", "import time; time.sleep(60)")
    assert "did not answer within 0.5 s" in preflight.visible_gpus(0.5).why
    monkeypatch.setattr(preflight, "ASK_TORCH", "raise ImportError('libcudart.so.13: cannot open')")
    assert preflight.visible_gpus().why == "torch can't be loaded: ImportError: libcudart.so.13: cannot open"


@pytest.mark.parametrize("pair", command.DEEPSPEED_FILES, ids="-".join)
def test_a_deepspeed_file_moves_what_the_config_says_and_no_more(pair):
    parallel, offload = pair
    compute = ComputeSpec.model_validate({"parallel": parallel, "offload": offload, "processes_per_node": 2})
    path = Path(llava_ext.__file__).parent / "deepspeed" / (command.deepspeed_file(compute) or "none")
    zero = json.loads(path.read_text())["zero_optimization"]
    assert f"zero{zero['stage']}" == parallel
    moved = {name for name in ("offload_optimizer", "offload_param") if name in zero}
    assert (
        moved
        == {
            "none": set(),
            "optimizer": {"offload_optimizer"},
            "parameters": {"offload_optimizer", "offload_param"},
        }[offload]
    )


# ---------------------------------------------------------------- verdicts


REASON = (
    "the loss is nan at step 5\nLook at --learning_rate, --normalize_projector and"
    " --per_device_train_batch_size"
)


def test_a_verdict_names_the_keys_of_the_configuration(spec, tmp_path):
    verdicts.pronounce(tmp_path, spec, REASON, "logs/attempt-001.log")
    with pytest.raises(UserError) as caught:
        verdicts.refuse_to_repeat(tmp_path, "finetune x", spec)
    for part in (
        "finetune x: the loss is nan",
        "stages.finetune.learning_rate, interventions.normalize_projector and compute.",
        ".per_device_batch_size",
        str(tmp_path / "logs/attempt-001.log"),
        f"raise compute.{spec['recipe']['compute']}.try_again by one",
    ):
        assert part in str(caught.value)
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("compute", "per_device_batch_size", 1),
        ("compute", "kernels", {"checkpoint_layers": "all"}),
        ("compute", "try_again", 1),
        ("recipe", "min_supervised_share", 0.0),
    ],
)
def test_a_changed_setting_clears_a_verdict_and_the_count_of_vain_attempts(
    spec, tmp_path, section, key, value
):
    def cause():
        return verdicts.cause_digest(spec)

    verdicts.pronounce(tmp_path, spec, REASON, "log")
    for _ in range(3):
        row = attempts.begin(tmp_path, attempts.read_attempts(tmp_path), cause=cause())
        attempts.end(tmp_path, row, "failed (1)")
    with pytest.raises(UserError, match="the last 3 attempts"):
        attempts.refuse_if_stuck(tmp_path, attempts.read_attempts(tmp_path), 3, cause())
    spec[section][key] = value
    verdicts.refuse_to_repeat(tmp_path, "finetune x", spec)
    assert not (tmp_path / "verdict.json").exists()
    attempts.refuse_if_stuck(tmp_path, attempts.read_attempts(tmp_path), 3, cause())


def test_changed_code_clears_a_verdict(spec, tmp_path, monkeypatch):
    verdicts.pronounce(tmp_path, spec, REASON, "log")
    (tmp_path / "llava_ext").mkdir()
    (tmp_path / "llava_ext/train.py").write_text("mended = True\n")
    monkeypatch.setattr(verdicts, "ROOT", tmp_path)
    verdicts.refuse_to_repeat(tmp_path, "finetune x", spec)


def test_a_changed_deepspeed_file_clears_a_verdict(spec, tmp_path):
    own = tmp_path / "own.json"
    own.write_text("{}")
    spec["compute"] |= {"deepspeed_config": str(own), "parallel": "zero2", "processes_per_node": 2}
    before = verdicts.settings_digest(spec)
    own.write_text('{"zero_optimization": {"stage": 2}}')
    assert verdicts.settings_digest(spec) != before


def test_every_flag_that_the_configuration_decides_has_its_key(spec, tmp_path):
    """A flag in a message is of no use to somebody who has written a configuration."""
    spec["recipe"] |= {
        "mm_projector_lr": 1e-4,
        "lora": {"r": 8, "alpha": 16, "dropout": 0.1, "bias": "none"},
    }
    spec["compute"] |= {"packing": True, "cache_pixels_mb": 1}
    spec["skip_samples"] = ["#12"]
    flags = [flag[2:] for flag in flags_of(spec, tmp_path) if flag.startswith("--")]
    ours = {"output_dir", "save_strategy", "tune_mm_mlp_adapter", "pretrain_mm_mlp_adapter"}
    assert [flag for flag in flags if verdicts.config_key(flag, spec) is None and flag not in ours] == []
    models = {verdicts.STAGE: StageSpec, verdicts.COMPUTE: ComputeSpec, verdicts.MODEL: ModelSection}
    models[verdicts.MIXTURE] = MixtureSpec
    for section, key in verdicts.RENAMED.values():
        assert key.partition(".")[0] in models[section].model_fields


@pytest.mark.slow
def test_a_launcher_ends_a_verdict_at_once_and_refuses_the_next_attempt(spec, tmp_path, monkeypatch, capfd):
    """The training is real and has a flag that it does not know."""
    for name, role in (("llm", "llm"), ("tower", "vision_tower")):
        (tmp_path / name).mkdir()
        write_json(tmp_path / f"{name}.json", {"role": role, "folder": name, "digest": name})
    write_json(tmp_path / "mixture.json", {"digest": "m"})
    (tmp_path / "samples.json").write_text("[]")
    manifest = tmp_path / "runs/pretrain/x/manifest.json"
    models = [tmp_path / "llm.json", tmp_path / "tower.json"]
    job = step.prepare(spec | {"stage": "pretrain"}, tmp_path / "mixture.json", models, None, manifest)
    with pytest.raises(UserError, match=r"samples\.json: holds no samples") as first:
        step.launch(job)
    with pytest.raises(UserError) as second:
        step.launch(job)
    assert str(first.value) == str(second.value)
    assert [row["outcome"] for row in attempts.read_attempts(job.state)] == ["verdict"]
    assert step.why_in_vain(job) == str(first.value)
    write_json(tmp_path / "mixture.json", {"digest": "other data"})
    other = step.prepare(spec | {"stage": "pretrain"}, tmp_path / "mixture.json", models, None, manifest)
    assert step.why_in_vain(other) is None


def test_a_training_gets_the_table_of_its_own_layout_of_the_same_data(spec, tmp_path):
    for name, role in (("llm", "llm"), ("tower", "vision_tower")):
        write_json(tmp_path / f"{name}.json", {"role": role, "folder": name, "digest": name})
    write_json(tmp_path / "mixture.json", {"digest": "m"})
    model = {"vision_tower": spec["model"]["vision_tower"], "vision_feature_select": "patch"}
    four = {"compression_after_projection": True, "final_spatial_size": 4}
    layouts = [{"of": [model | {"flags": flags}], "file": name} for flags, name in (({}, "16"), (four, "4"))]
    survey = tmp_path / "survey.json"
    models = [tmp_path / "llm.json", tmp_path / "tower.json"]

    def table(mixture, **flags):
        write_json(survey, {"inputs": {"mixture": mixture, "llm": "llm"}, "layouts": layouts})
        about = spec | {"stage": "pretrain", "interventions": flags}
        job = step.prepare(about, tmp_path / "mixture.json", models, None, tmp_path / "manifest.json", survey)
        return job.inputs.token_lengths

    assert table("m") == table("m", normalize_projector=True) == tmp_path / "16"
    assert table("m", normalize_projector=True, **four) == tmp_path / "4"
    assert table("m", interleave=True) is None and table("of other data") is None


class Executor:
    """What Snakemake's executors have: it starts jobs, and hears of those that failed."""

    def __init__(self):
        self.started, self.failed, self.ended = [], [], []

    def run_jobs(self, jobs):
        self.started += jobs

    def report_job_error(self, info, msg=None):
        self.failed.append((info.job, msg))

    def handle_job_error(self, job):
        self.ended.append(job)


@dataclass(eq=False)
class SnakemakeJob:
    training: step.Job | None
    log: list[str] = field(default_factory=list)
    attempt: int = 1
    restart_times: int = 3


@pytest.fixture
def executor():
    found = Executor()
    scheduler = SimpleNamespace(_executor=found, _local_executor=None)
    spare_vain_attempts(SimpleNamespace(scheduler=scheduler), lambda job: job.training)
    return found


def a_training(spec, folder):
    job = step.Job(spec, Inputs(folder, folder, folder), {"mixture": "m"}, folder / "manifest.json")
    job.state.mkdir(parents=True, exist_ok=True)
    return job


def may_restart(job):
    """Snakemake's own question."""
    return job.restart_times > job.attempt - 1


def test_jobs_that_are_no_trainings_are_started_and_retried_as_ever(executor):
    job = SnakemakeJob(None)
    executor.run_jobs([job])
    executor.handle_job_error(job)
    assert executor.started == executor.ended == [job] and may_restart(job)


@pytest.mark.parametrize(
    ("error", "restarts"),
    [
        (UserError("two turns of one side"), False),
        (Hiccup("the disk is full"), True),
        (OSError(5, "io"), True),
    ],
)
def test_a_step_that_is_refused_its_inputs_is_not_retried(
    executor, tmp_path, monkeypatch, capfd, error, restarts
):
    @user_errors()
    def fail(arguments):
        raise error

    log = tmp_path / "merge.log"
    log.write_text(
        f"of an earlier Snakemake\nthe step merge failed with status 1 {REPEATS}; its log: {log}\n"
    )
    monkeypatch.setattr(step_module, "find_main", lambda name: fail)
    executor.run_jobs([killed := SnakemakeJob(None, [log]), job := SnakemakeJob(None, [log])])
    executor.handle_job_error(killed)
    assert may_restart(killed)
    with capfd.disabled():  # what is printed goes where the step sends it
        assert run_step("merge", [], log) == 1
    executor.handle_job_error(job)
    assert may_restart(job) is restarts


def test_a_training_that_failed_without_a_word_may_be_retried(executor, spec, tmp_path):
    training = a_training(spec, tmp_path)
    with suppress(UserError), attempts.recorded_refusal(training.state):
        raise UserError("n1: 0 GPUs are visible")  # by an earlier Snakemake
    job = SnakemakeJob(training)
    executor.run_jobs([job])
    executor.handle_job_error(job)
    assert executor.started == [job] and may_restart(job)


def test_a_refused_start_is_not_retried_and_a_new_snakemake_tries_it(executor, spec, tmp_path):
    training = a_training(spec, tmp_path)
    job = SnakemakeJob(training)
    executor.run_jobs([job])
    with suppress(UserError), attempts.recorded_refusal(training.state):
        raise UserError("n1: 0 GPUs are visible")
    executor.handle_job_error(job)
    assert not may_restart(job)
    executor.run_jobs([again := SnakemakeJob(training)])
    assert executor.started == [job, again]


def test_a_verdict_is_not_retried_and_not_started_until_something_changes(executor, spec, tmp_path):
    training = a_training(spec, tmp_path)
    job = SnakemakeJob(training)
    executor.run_jobs([job])
    verdicts.pronounce(training.state, spec, REASON, "log")
    executor.handle_job_error(job)
    assert executor.started == executor.ended == [job] and not may_restart(job)
    again = SnakemakeJob(training)
    executor.run_jobs([again])
    ((failed, reason),) = executor.failed
    assert executor.started == [job] and failed is again and "the loss is nan at step 5" in reason
    executor.handle_job_error(again)
    assert not may_restart(again)
    spec["compute"]["try_again"] = 1
    executor.run_jobs([third := SnakemakeJob(a_training(spec, tmp_path))])
    assert executor.started == [job, third]


def test_an_old_verdict_of_other_code_ends_no_retries_unless_the_job_was_refused_for_it(
    executor, spec, tmp_path, monkeypatch
):
    training = a_training(spec, tmp_path)
    verdicts.pronounce(training.state, spec, REASON, "log")
    with monkeypatch.context() as here:  # the job has other packages than Snakemake, in a container say
        here.setattr(verdicts, "versions", lambda: {"torch": "another"})
        executor.run_jobs([killed := SnakemakeJob(training), refused := SnakemakeJob(training)])
    assert executor.started == [killed, refused]
    executor.handle_job_error(killed)
    assert may_restart(killed)
    with pytest.raises(UserError, match="the loss is nan"):
        verdicts.refuse_to_repeat(training.state, "finetune x", spec)
    executor.handle_job_error(refused)
    assert not may_restart(refused)


def test_a_training_that_is_stuck_is_not_started(executor, spec, tmp_path):
    training = a_training(spec, tmp_path)
    for _ in range(training.compute.max_stuck_attempts):
        row = attempts.begin(
            training.state, attempts.read_attempts(training.state), cause=verdicts.cause_digest(spec)
        )
        attempts.end(training.state, row, "failed (-9)")
    executor.run_jobs([SnakemakeJob(training)])
    assert not executor.started and "saved nothing beyond step 0" in executor.failed[0][1]
    # one that still runs elsewhere has not failed yet
    owner = ownership.Ownership(training.state)
    owner.claim()
    executor.run_jobs([living := SnakemakeJob(training)])
    owner.release()
    assert executor.started == [living]
