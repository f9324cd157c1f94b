"""What is measured on the finished checkpoints: named tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.lmms import LmmsSpec
from workflow_scripts.config.question_fields import FieldsSpec
from workflow_scripts.config.types import Count, Name, Positive, Seed, Share
from workflow_scripts.evaluate.metrics import METRICS
from workflow_scripts.evaluate.published import BENCHMARKS
from workflow_scripts.evaluate.tasks import TASKS

if TYPE_CHECKING:
    BenchmarkName: TypeAlias = str
    KindName: TypeAlias = str
    MetricName: TypeAlias = str
else:
    BenchmarkName = Literal[BENCHMARKS]
    KindName = Literal[tuple(TASKS)]
    MetricName = Literal[tuple(METRICS)]
Level = Annotated[int, Field(ge=0, le=255)]


class ConditionsSpec(StrictModel):
    """How each question is asked besides as it is."""

    permuted: Annotated[Count, Field(le=100)] = 1
    """In so many random orders of the picture's vision tokens, each with a seed of its own; the
    position sensitivity index PSI needs one."""
    blank: bool = True
    """About a picture of one colour and the same size: what can be guessed without seeing."""
    text_only: bool = False
    """Without any picture."""


class TaskSpec(StrictModel):
    """One task: where its questions come from, how they are asked, and what counts as right.

    Metric, bounds and examples are about scores: a change of them counts the same answers again. The size of
    batches, the shards and the time limit are about jobs: a change of them changes nothing.
    """

    ABOUT_SCORES: ClassVar = frozenset(
        {"metric", "examples", "benchmark", "max_empty_share", "max_unparsed_share", "expected_questions"}
    )
    ABOUT_JOBS: ClassVar = frozenset({"batch_size", "shards", "runtime_min"})

    source: str
    """Name of the source with the questions and their pictures."""
    kind: KindName = "shapes"
    """The form of the questions: `shapes` (one LLaVA record a question, with `question_type`: drawn sources
    with `split: test` and `two_d_shapes`), `two_d_shapes` (parquet in the published form of 2DS), `table`
    (your own JSON, JSON lines, CSV or parquet, see `fields`), or `lmms` (a task of lmms-eval over the
    source's parquet files, see `lmms`)."""
    fields: FieldsSpec | None = None
    """The columns of a `table`."""
    lmms: LmmsSpec | None = None
    """The task of lmms-eval."""
    prompt_prefix: str = ""
    """Put before each question."""
    prompt_suffix: str = ""
    """Put behind each question and its choices: "\\nAnswer the question using a single word or phrase."."""
    metric: MetricName = "exact_match"
    """What counts as right: `exact_match` (without case, blanks and a final full stop), `yes_no` (the
    answer's first word), `choice_letter`, `vqa_accuracy` (a share, by ten people's answers), `lmms_eval` (the
    task's own; what `kind: lmms` has, and nothing else)."""
    conditions: ConditionsSpec = ConditionsSpec()
    """Under which conditions each question is asked besides as it is."""
    pictures: Positive | None = None
    """Use the questions about the first so many pictures; null means all."""
    permute_seed: Seed = 0
    """Seed of the permutations; each question has its own, the same for every checkpoint."""
    blank_colour: tuple[Level, Level, Level] = (122, 116, 104)
    """Red, green and blue (0 to 255) of the blank picture; the default is the mean of CLIP's training
    pictures.
    """
    max_new_tokens: Annotated[Positive, Field(le=1024)] = 8
    """Longest answer, in tokens."""
    batch_size: Positive = 32
    """Questions answered at once."""
    shards: Annotated[Positive, Field(le=1000)] = 1
    """Jobs that share the questions."""
    runtime_min: Positive = 120
    """Time limit of one job in minutes; what it has answered by then is kept, and the next continues."""
    expected_questions: Positive | None = None
    """Number of questions; another number is an error."""
    max_empty_share: Share = 0.02
    """More empty answers (as the questions are, without a condition) are an error, with examples."""
    max_unparsed_share: Share = 0.1
    """More answers that the metric can't read are an error, with examples."""
    examples: Annotated[Count, Field(le=50)] = 6
    """Pictures shown in the report with each checkpoint's answers, and as many questions on which the
    checkpoints disagree."""
    benchmark: BenchmarkName | None = None
    """Which benchmark this is: what others have published about it stands beside the report's numbers."""

    def asked(self) -> dict[str, Any]:
        """What decides the answers, the questions' content aside: JSON values, without defaults."""
        other = self.ABOUT_SCORES | self.ABOUT_JOBS | {"source", "kind", "lmms"}
        said = self.model_dump(mode="json", exclude_defaults=True, exclude=set(other))
        return {"kind": self.kind, **said, **({"lmms": self.lmms.asked()} if self.lmms else {})}

    def scored(self) -> dict[str, Any]:
        """What decides the scores of given answers: JSON values, without defaults."""
        about: Any = {**dict.fromkeys(self.ABOUT_SCORES, True), "lmms": set(LmmsSpec.ABOUT_SCORES)}
        found = self.model_dump(mode="json", exclude_defaults=True, include=about)
        return {key: value for key, value in found.items() if value != {}}

    @model_validator(mode="before")
    @classmethod
    def _metric_of_lmms(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("kind") == "lmms":
            return {"metric": "lmms_eval", **data}
        return data

    @model_validator(mode="after")
    def _lmms_goes_together(self) -> Self:
        prepared = TASKS[self.kind].prepared
        if (self.lmms is not None) != prepared:
            advice = "add lmms: {task: NAME}" if prepared else "remove it or set kind: lmms"
            raise ValueError(f"kind: {self.kind} {'needs' if prepared else 'takes no'} lmms; {advice}")
        if (METRICS[self.metric].score is None) != prepared:
            fit = [name for name, metric in METRICS.items() if (metric.score is None) == prepared]
            raise ValueError(
                f"metric: {self.metric} does not go with kind: {self.kind}; use {' or '.join(fit)}"
            )
        return self

    @model_validator(mode="after")
    def _fields_of_a_table(self) -> Self:
        if (self.fields is not None) != TASKS[self.kind].takes_fields:
            takers = [name for name, kind in TASKS.items() if kind.takes_fields]
            raise ValueError(
                f"kind: {self.kind} {'needs' if self.fields is None else 'takes no'} fields; "
                + (
                    "add fields: {}"
                    if self.fields is None
                    else f"remove them or set kind: {' or '.join(takers)}"
                )
            )
        return self


class EvaluationSpec(StrictModel):
    """Tasks that every finished checkpoint is asked, and how the checkpoints are compared.

    A section without `tasks` is one task, as it was when there was one: its keys are the task's, and its
    `task` (`shapes`) is both name and kind.
    """

    tasks: Annotated[dict[Name, TaskSpec], Field(min_length=1)]
    """The tasks, by name: each becomes `experiments/<experiment>/evaluation/<task>.json`."""
    default_tasks: tuple[str, ...] | None = None
    """The tasks that experiments without `tasks` of their own are asked; left out, all."""
    baseline: str | None = None
    """The experiment that all others are compared with, question by question; left out, the first."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Share of the intervals that hold the true value; 1 minus it is the level of the tests."""
    resamples: Annotated[Positive, Field(ge=100, le=100_000)] = 2000
    """Bootstrap samples of an interval."""
    seed: Seed = 0
    """Seed of the bootstrap."""

    @model_validator(mode="before")
    @classmethod
    def _one_task(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "tasks" in data or "source" not in data:
            return data
        kind = str(data.get("task", "shapes"))
        return {"tasks": {kind: {"kind": kind, **{key: data[key] for key in data if key != "task"}}}}
