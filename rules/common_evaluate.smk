# What the rules of evaluations share.
import shlex

# What was answered is kept, so an attempt that is killed or out of time is worth another.
ANSWER_RETRIES = 0 if workflow.remote_exec else 2


def evaluated(stage, run):
    """The task (name, section) of a run of predictions or scores of this configuration."""
    try:
        return plan.task_of(stage, run)
    except KeyError:
        known = ", ".join(plan.names(stage)) or "(there are none)"
        raise WorkflowError(
            f"runs/{stage}/{run} belongs to no task of this configuration; runs of {stage}: {known}"
        )


def prediction_inputs(wildcards):
    """The checkpoint and the questions of predictions."""
    task, _ = evaluated("predict", wildcards.run)
    experiment = owner("predict", wildcards.run)
    return {
        "checkpoint": plan.run("export", experiment).manifest,
        "source": plan.questions_manifest(task),
    }


def is_put_together(wildcards):
    """Whether a job only puts together what shards answered."""
    return not hasattr(wildcards, "shard") and bool(plan.shard_files(wildcards.run))


def prediction_resource(name):
    """A function of the wildcards: one resource of a job that asks questions."""

    def value(wildcards):
        evaluated("predict", wildcards.run)
        if is_put_together(wildcards):
            return {"mem_mb": 4000, "gres": None, "train_slots": 0}[name]
        return plan.single_job("predict", wildcards.run)[name]

    return value


def prediction_runtime(wildcards):
    """Minutes of a job that asks questions."""
    return evaluated("predict", wildcards.run)[1].runtime_min


def task_spec(stage):
    """The arguments that say which task is asked. Not tracked (they take `resources`): what matters is in the key."""

    def arguments(wildcards, resources):
        name, spec = evaluated(stage, wildcards.run)
        return f"--task {name} --spec {shlex.quote(compact(plain(spec)))}"

    return arguments


def predictions_of(run):
    """The manifest of the predictions that a run of scores counts."""
    task, _ = evaluated("score", run)
    return plan.evaluations[owner("score", run), task].predict.manifest


def prepared(wildcards):
    """The section of the task whose questions are written."""
    with readable_errors():
        item = by_name(plan.questions.values(), wildcards.questions)
    return plan.task_spec(item.task)


def lmms_scores_of(run):
    """What lmms-eval says of the answers that a run of scores counts; nothing where the metric is ours."""
    task, _ = evaluated("score", run)
    return [f"runs/score/{run}/lmms_eval.json"] if task in plan.questions else []


def evaluation_of(experiment, task):
    """An experiment's evaluation by a task, or a message that says which there are."""
    lookup("experiments", experiment)
    if (experiment, task) not in plan.evaluations:
        known = [item.task for item in plan.evaluations_of(experiment)]
        raise WorkflowError(
            f"experiments.{experiment} is not asked the task {task!r}; tasks: {', '.join(known) or '(there are none)'}"
        )
    return plan.evaluations[experiment, task]


def scores_of(experiment):
    """The manifests of an experiment's scores of all of its tasks."""
    lookup("experiments", experiment)
    return [item.score.manifest for item in plan.evaluations_of(experiment)]
