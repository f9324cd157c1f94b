# Results: checkpoints for others to use, under the experiments' names, what they can do, and the page about it.


rule export:
    input:
        unpack(export_inputs),
    output:
        manifest="runs/export/{run}/manifest.json",
    log:
        "logs/export/{run}.log",
    retries: ONCE_MORE
    conda:
        "../envs/environment.yaml"
    resources:
        mem_mb=lambda wildcards: plan.single_job("export", wildcards.run)["mem_mb"],
        runtime=STEP_JOBS["export"].runtime,
    params:
        step=step,
        spec=lambda wildcards, resources: compact(plan.export_spec(wildcards.run)),
        made_from=named_inputs,
    shell:
        "{params.step} --log {log} export --spec {params.spec:q} {params.made_from} --manifest {output.manifest}"


rule checkpoint:
    input:
        unpack(checkpoint_inputs),
    output:
        manifest="experiments/{experiment}/checkpoint.json",
    log:
        "logs/checkpoint/{experiment}.log",
    conda:
        "../envs/environment.yaml"
    params:
        step=step,
        spec=lambda wildcards: compact(plan.checkpoint_spec(wildcards.experiment)),
        made_from=named_inputs,
    shell:
        "{params.step} --log {log} link --spec {params.spec:q} {params.made_from} --manifest {output.manifest}"


rule report:
    input:
        checkpoints=expand(
            "experiments/{experiment}/checkpoint.json", experiment=plan.checkpoints
        ),
        evaluations=[item.named for item in plan.evaluations.values()],
        comparisons=expand(
            "experiments/{experiment}/comparison.json", experiment=plan.comparisons()
        ),
        diagnostics=expand(
            "experiments/{experiment}/diagnostics.json", experiment=plan.diagnosed()
        ),
        trainings=[run.manifest for run in plan.trainings()],
        mixtures=expand(
            "data/mixtures/{mixture}/manifest.json", mixture=plan.used_mixtures()
        ),
        surveys=[survey.manifest for survey in plan.surveys.values()],
        scans=expand("data/scans/{source}/manifest.json", source=plan.scanned()),
        sources=[source_manifest(name) for name in sorted(plan.used_sources())],
    output:
        page=report(
            "report/index.html",
            category="Results",
            caption="../docs/report.rst",
        ),
    log:
        "logs/report.log",
    retries: ONCE_MORE
    conda:
        "../envs/environment.yaml"
    params:
        step=step,
    shell:
        "{params.step} --log {log} report --inputs {input} --output {output.page}"


rule list_unused:
    log:
        "logs/list_unused.log",
    conda:
        "../envs/environment.yaml"
    params:
        step=step,
        used=compact(plan.used_folders()),
    shell:
        "{params.step} --log {log} clean --used {params.used:q}"


rule clean_unused:
    log:
        "logs/clean_unused.log",
    conda:
        "../envs/environment.yaml"
    params:
        step=step,
        used=compact(plan.used_folders()),
    shell:
        "{params.step} --log {log} clean --used {params.used:q} --remove"
