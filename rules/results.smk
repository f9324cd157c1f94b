# Results: checkpoints for others to use, under the experiments' names, what they can do, and the page about it.


rule export:
    input:
        finetune=lambda wildcards: plan.run(
            "finetune", training("export", wildcards.run).name
        ).manifest,
    output:
        manifest="runs/export/{run}/manifest.json",
    log:
        "logs/export/{run}.log",
    conda:
        "../envs/environment.yaml"
    resources:
        mem_mb=lambda wildcards: plan.single_job("export", wildcards.run)["mem_mb"],
        runtime=120,
    params:
        step=step,
        spec=lambda wildcards, resources: compact(plan.export_spec(wildcards.run)),
    shell:
        "{params.step} --log {log} export --spec {params.spec:q} --finetune {input.finetune} --manifest {output.manifest}"


rule checkpoint:
    input:
        pretrain=lambda wildcards: run_of("pretrain", wildcards.experiment),
        finetune=lambda wildcards: run_of("finetune", wildcards.experiment),
        export=lambda wildcards: run_of("export", wildcards.experiment),
    output:
        manifest="experiments/{experiment}/checkpoint.json",
    log:
        "logs/checkpoint/{experiment}.log",
    conda:
        "../envs/environment.yaml"
    params:
        step=step,
        spec=lambda wildcards: compact(plan.checkpoint_spec(wildcards.experiment)),
    shell:
        "{params.step} --log {log} link --spec {params.spec:q} --pretrain {input.pretrain} --finetune {input.finetune}"
        " --export {input.export} --manifest {output.manifest}"


rule evaluate:
    input:
        checkpoint=lambda wildcards: plan.run(
            "export", training("evaluate", wildcards.run).name
        ).manifest,
        source=lambda wildcards: source_manifest(plan.config.evaluation.source),
    output:
        manifest="runs/evaluate/{run}/manifest.json",
    log:
        "logs/evaluate/{run}.log",
    conda:
        "../envs/environment.yaml"
    resources:
        mem_mb=lambda wildcards: plan.single_job("evaluate", wildcards.run)["mem_mb"],
        runtime=120,
        gres=lambda wildcards: plan.single_job("evaluate", wildcards.run)["gres"],
        train_slots=lambda wildcards: plan.single_job("evaluate", wildcards.run)[
            "train_slots"
        ],
    params:
        step=step,
        spec=lambda wildcards, resources: compact(plan.evaluation_spec(wildcards.run)),
    shell:
        "{params.step} --log {log} evaluate --spec {params.spec:q} --checkpoint {input.checkpoint} --source {input.source}"
        " --manifest {output.manifest}"


rule report:
    input:
        checkpoints=expand(
            "experiments/{experiment}/checkpoint.json", experiment=plan.experiments
        ),
        evaluations=[
            plan.run("evaluate", name).manifest
            for name in plan.experiments
            if plan.config.evaluation
        ],
        trainings=[
            f"runs/{stage}/{name}/manifest.json"
            for stage in STAGES
            for name in plan.names(stage)
        ],
        mixtures=expand(
            "data/mixtures/{mixture}/manifest.json", mixture=plan.used_mixtures()
        ),
        scans=expand("data/scans/{source}/manifest.json", source=plan.scanned()),
        sources=expand(
            "data/sources/{source}/manifest.json", source=plan.used_sources()
        ),
    output:
        page=report(
            "report/index.html",
            category="Results",
            caption="../docs/report.rst",
        ),
    log:
        "logs/report.log",
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
