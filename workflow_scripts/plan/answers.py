"""Hours of answers and diagnoses: from a model of what they take, corrected by what earlier ones took here.

An answer takes the operations of its prompt and of the tokens that are made (llava_ext/flops.py), a picture's
decoding and resizing on the CPU, and a pass of the model for each new token that a batch shares. A job starts
libraries and reads the weights first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from statistics import median

from llava_ext.flops import CARDS, Counted, Products
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.evaluate.conditions import conditions_of
from workflow_scripts.evaluate.pace import read_pace
from workflow_scripts.io import read_json
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.runs import Run
from workflow_scripts.plan.sizes import products
from workflow_scripts.plan.tokens import Speeds, measured_speeds
from workflow_scripts.stages import last_stage

TEXT_TOKENS = 100
"""Tokens of a prompt beside the picture's: the template's, the question's and its choices'."""
GPU_FLOPS = 0.3 * CARDS["NVIDIA A100-SXM4-80GB"]
"""Operations a second of a GPU of which nothing is known."""
CPU_FLOPS = 2e10
"""The same of a CPU: only a measure for what was seen there."""
PICTURE_S = 0.02
"""Seconds in which a CPU makes a picture ready."""
PASS_S = 0.03
"""Seconds of a pass that makes one more token of each answer of a batch."""
START_S = 10.0
"""Seconds in which a job starts, and bytes of weights that it reads in one."""
READ_BYTES = 1e9


@dataclass(frozen=True)
class Cost:
    """What a run of predictions or a diagnosis takes.

    Attributes:
        seconds: of all its jobs together; None where the models' sizes are not known yet, and on a CPU where
            nothing was answered before.
        jobs: that share it.
        is_measured: by what earlier answers took here.
    """

    run: Run
    seconds: float | None
    jobs: int
    on_gpu: bool
    is_measured: bool

    @property
    def finished(self) -> bool:
        """Whether it is done."""
        return Path(self.run.manifest).is_file()

    @property
    def left(self) -> float | None:
        """Seconds that are still to be spent."""
        return 0.0 if self.finished else self.seconds


def questions_of(plan: Plan, task: str) -> int | None:
    """The number of a task's questions: the stated one, else that of what was written or answered here."""
    spec = plan.task_spec(task)
    if spec.expected_questions:
        return spec.expected_questions
    makers = [item.predict.manifest for item in plan.evaluations.values() if item.task == task]
    if task in plan.questions and spec.pictures is None:
        makers.append(plan.questions[task].manifest)
    made = next((Path(path) for path in makers if Path(path).is_file()), None)
    return int(read_json(made)["questions"]) if made else None


def answers_of(plan: Plan, task: str) -> int | None:
    """Answers to a task's questions by one checkpoint, under all conditions; None where unknown."""
    questions = questions_of(plan, task)
    return None if questions is None else questions * len(conditions_of(plan.task_spec(task).conditions))


# ---- what it would take ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A checkpoint as the model of time sees it: its products, and the tokens of a picture."""

    model: Products
    vision: int

    def prompt(self, new: int, with_picture: bool = True) -> float:
        """Operations of a prompt and of ``new`` tokens behind it."""
        length = TEXT_TOKENS + with_picture * self.vision + new
        return self.model.forward(Counted(length, length * (length + 1) / 2, new, with_picture))

    def answer(self, spec: TaskSpec, speed: float, with_picture: bool = True) -> float:
        """Seconds of an answer as long as the task allows, at ``speed`` operations a second."""
        new = spec.max_new_tokens
        shared = new * PASS_S / spec.batch_size
        return self.prompt(new, with_picture) / speed + shared + with_picture * PICTURE_S

    def mean_answer(self, spec: TaskSpec, speed: float) -> float:
        """The mean of :meth:`answer` over the task's conditions."""
        shown = [condition.name != "text_only" for condition in conditions_of(spec.conditions)]
        return sum(self.answer(spec, speed, with_picture) for with_picture in shown) / len(shown)

    def look(self, speed: float) -> float:
        """Seconds of one picture of a diagnosis, which is shown as it is and permuted."""
        return 2 * self.prompt(1) / speed + PICTURE_S

    def start(self) -> float:
        """Seconds in which a job begins; weights have two bytes."""
        return START_S + 2 * (self.model.layers + self.model.head) / READ_BYTES


def asked_of(plan: Plan, name: str) -> Asked | None:
    """An experiment's checkpoint; None where its sizes are not known yet, or where it is not trained here."""
    experiment = plan.experiments.get(name)
    model = products(plan.config, experiment, last_stage()) if experiment else None
    if experiment is None or model is None or not model.patches:
        return None
    extra = int(experiment.model.vision_feature_select == "cls_patch")
    return Asked(model, experiment.interventions.tokens_per_image(isqrt(model.patches), extra))


# ---- what it took ------------------------------------------------------------------------------------------

Factors = Mapping[str, float]
"""Seconds that were spent for each that the model of time says: by experiment, kind of job and card."""


class Prices:
    """Prices all runs of a plan's evaluation."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.speeds: Speeds = measured_speeds(plan)
        self.asked = {name: asked_of(plan, name) for name in plan.checkpoints}
        self.factors = self._factors()

    def predictions(self) -> list[Cost]:
        """Each run of predictions once, in the order of the configuration."""
        runs = {item.predict.name: item.predict for item in self.plan.evaluations.values()}
        return [self._prediction(run) for run in runs.values()]

    def diagnoses(self) -> list[Cost]:
        """Each diagnosis once."""
        runs = {item.run.name: item.run for item in self.plan.diagnoses.values()}
        return [self._diagnosis(run) for run in runs.values()]

    def _prediction(self, run: Run) -> Cost:
        spec, asked = self.plan.task_spec(run.task), self.asked[run.experiment]
        answers, jobs = answers_of(self.plan, run.task), spec.shards
        if asked is None or answers is None:
            return Cost(run, None, jobs, self._on_gpu(run), False)
        return self._cost(run, answers * asked.mean_answer(spec, self._speed(run)), jobs, asked)

    def _diagnosis(self, run: Run) -> Cost:
        spec, asked = self.plan.config.diagnostics, self.asked[run.experiment]
        if asked is None or spec is None:
            return Cost(run, None, 1, self._on_gpu(run), False)
        return self._cost(run, spec.pictures * asked.look(self._speed(run)), 1, asked)

    def _cost(self, run: Run, modelled: float, jobs: int, asked: Asked) -> Cost:
        factor = next((self.factors[name] for name in self._names(run) if name in self.factors), None)
        on_gpu = self._on_gpu(run)
        if factor is None and not on_gpu:
            return Cost(run, None, jobs, on_gpu, False)
        seconds = modelled * (factor or 1) + jobs * asked.start()
        return Cost(run, seconds, jobs, on_gpu, factor is not None)

    def _factors(self) -> Factors:
        found: dict[str, list[float]] = {}
        for item in self.plan.evaluations.values():
            asked, (answers, seconds) = self.asked[item.experiment], read_pace(Path(item.predict.folder))
            if asked is not None and answers:
                spec, speed = self.plan.task_spec(item.task), self._speed(item.predict)
                factor = seconds / answers / asked.mean_answer(spec, speed)
                for name in self._names(item.predict):
                    found.setdefault(name, []).append(factor)
        return {name: median(factors) for name, factors in found.items()}

    def _names(self, run: Run) -> list[str]:
        """What runs may share a factor by: the checkpoint, the kind of job, the card."""
        kind = self.plan.single_compute(run.stage, run.name)
        compute = self.plan.config.compute[kind]
        card = [f"{compute.gpu_gb:g} GB"] if compute.gpu_gb and compute.gpus_per_node else []
        return [f"experiment {run.experiment}", f"compute {kind}", *card]

    def _on_gpu(self, run: Run) -> bool:
        return self.plan.single_job(run.stage, run.name)["train_slots"] > 0

    def _speed(self, run: Run) -> float:
        """Operations a second: those of a training that is finished here on the same kind of job or card."""
        for name in self._names(run)[1:]:
            speed = self.speeds.get((last_stage(), name.removeprefix("compute ")))
            if speed is not None and speed.flops:
                return speed.flops
        return GPU_FLOPS if self._on_gpu(run) else CPU_FLOPS


def hours(costs: Iterable[Cost]) -> tuple[float, int]:
    """Hours that are left, as far as known, and how many runs are of unknown length."""
    left = [cost.left for cost in costs]
    return sum(seconds for seconds in left if seconds is not None) / 3600, left.count(None)
