# Evaluations: answers of checkpoints to the questions of tasks, their scores, comparisons with the baseline.


# As a task of lmms-eval words and shows them.
rule prepare_questions:
    input:
        source=lambda wildcards: source_manifest(prepared(wildcards).source),
    output:
        manifest="data/questions/{questions}/manifest.json",
    log:
        "logs/questions/{questions}.log",
    retries: ONCE_MORE
    conda:
        "../envs/evaluation.yaml"
    resources:
        mem_mb=STEP_JOBS["prepare_questions"].mem_mb,
        runtime=STEP_JOBS["prepare_questions"].runtime,
    params:
        step=lmms_step,
        # not tracked (it takes `resources`): what matters is in the name
        spec=lambda wildcards, resources: compact(plain(prepared(wildcards).lmms)),
    shell:
        "{params.step} --log {log} evaluate.lmms.questions --name {wildcards.questions} --spec {params.spec:q}"
        " --source {input.source} --manifest {output.manifest}"


rule predict_shard:
    input:
        unpack(prediction_inputs),
    output:
        note="runs/predict/{run}/shard-{shard}-of-{shards}.json",
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
        manifest=lambda wildcards, output: Path(output.note).with_name("manifest.json"),
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


# By the metrics of the task itself.
rule lmms_scores:
    input:
        predictions=lambda wildcards: predictions_of(wildcards.run),
        source=lambda wildcards: source_manifest(
            evaluated("score", wildcards.run)[1].source
        ),
    output:
        scores="runs/score/{run}/lmms_eval.json",
    log:
        "logs/lmms_scores/{run}.log",
    retries: ONCE_MORE
    conda:
        "../envs/evaluation.yaml"
    resources:
        mem_mb=STEP_JOBS["lmms_scores"].mem_mb,
        runtime=STEP_JOBS["lmms_scores"].runtime,
    params:
        step=lmms_step,
        spec=lambda wildcards, resources: compact(
            plain(evaluated("score", wildcards.run)[1])
        ),
    shell:
        "{params.step} --log {log} evaluate.lmms.scores --spec {params.spec:q} --source {input.source}"
        " --predictions {input.predictions} --output {output.scores}"


rule score:
    input:
        predictions=lambda wildcards: predictions_of(wildcards.run),
        lmms=lambda wildcards: lmms_scores_of(wildcards.run),
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
        " --manifest {output.manifest} --lmms {input.lmms}"


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
