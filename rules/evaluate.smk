# Evaluations: answers of checkpoints to the questions of tasks, their scores, comparisons with the baseline.
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
    _, spec = evaluated("predict", wildcards.run)
    experiment = training("predict", wildcards.run).name
    return {
        "checkpoint": plan.run("export", experiment).manifest,
        "source": source_manifest(spec.source),
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
    return plan.evaluations[training("score", run).name, task].predict.manifest


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


rule predict_shard:
    input:
        unpack(prediction_inputs),
    output:
        note="runs/predict/{run}/shards/{shard}-of-{shards}.json",
    log:
        "logs/predict/{run}.{shard}-of-{shards}.log",
    retries: ANSWER_RETRIES
    conda:
        "../envs/environment.yaml"
    resources:
        mem_mb=prediction_resource("mem_mb"),
        runtime=prediction_runtime,
        gres=prediction_resource("gres"),
        train_slots=prediction_resource("train_slots"),
    params:
        step=step,
        spec=task_spec("predict"),
        manifest=lambda wildcards: f"runs/predict/{wildcards.run}/manifest.json",
    shell:
        "{params.step} --log {log} evaluate.predict {params.spec} --checkpoint {input.checkpoint} --source {input.source}"
        " --manifest {params.manifest} --shard {wildcards.shard} --of {wildcards.shards} --note {output.note}"


# With shards it only puts together what they answered.
rule predict:
    input:
        unpack(prediction_inputs),
        shards=lambda wildcards: evaluated("predict", wildcards.run)
        and plan.shard_files(wildcards.run),
    output:
        manifest="runs/predict/{run}/manifest.json",
    log:
        "logs/predict/{run}.log",
    retries: ANSWER_RETRIES
    conda:
        "../envs/environment.yaml"
    resources:
        mem_mb=prediction_resource("mem_mb"),
        runtime=prediction_runtime,
        gres=prediction_resource("gres"),
        train_slots=prediction_resource("train_slots"),
    params:
        step=step,
        spec=task_spec("predict"),
    shell:
        "{params.step} --log {log} evaluate.predict {params.spec} --checkpoint {input.checkpoint} --source {input.source}"
        " --manifest {output.manifest} --shards {input.shards}"


rule score:
    input:
        predictions=lambda wildcards: predictions_of(wildcards.run),
    output:
        manifest="runs/score/{run}/manifest.json",
    log:
        "logs/score/{run}.log",
    conda:
        "../envs/environment.yaml"
    params:
        step=step,
        # what is no part of the key is about jobs
        spec=lambda wildcards, resources: compact(plan.score_spec(wildcards.run)),
    shell:
        "{params.step} --log {log} evaluate.score --spec {params.spec:q} --predictions {input.predictions}"
        " --manifest {output.manifest}"


rule evaluation:
    input:
        scores=lambda wildcards: evaluation_of(
            wildcards.experiment, wildcards.task
        ).score.manifest,
    output:
        scores="experiments/{experiment}/evaluation/{task}.json",
    log:
        "logs/evaluation/{experiment}.{task}.log",
    conda:
        "../envs/environment.yaml"
    params:
        step=step,
    shell:
        "{params.step} --log {log} evaluate.link --experiment {wildcards.experiment} --scores {input.scores}"
        " --output {output.scores}"


rule compare:
    input:
        scores=lambda wildcards: scores_of(wildcards.experiment),
        baseline=lambda wildcards: scores_of(plan.baseline),
    output:
        comparison="experiments/{experiment}/comparison.json",
    log:
        "logs/compare/{experiment}.log",
    conda:
        "../envs/environment.yaml"
    params:
        step=step,
        spec=lambda wildcards: compact(plan.comparison_spec(wildcards.experiment)),
    shell:
        "{params.step} --log {log} evaluate.compare --spec {params.spec:q} --scores {input.scores}"
        " --baseline {input.baseline} --output {output.comparison}"
