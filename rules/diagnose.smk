# Diagnostics: what happens inside checkpoints while they read the questions of tasks.


rule diagnose:
    input:
        unpack(diagnosis_inputs),
    output:
        manifest="runs/diagnose/{run}/manifest.json",
    log:
        "logs/diagnose/{run}.log",
    retries: ONCE_MORE
    conda:
        "../envs/environment.yaml"
    resources:
        mem_mb=diagnosis_resource("mem_mb"),
        runtime=diagnosis_runtime,
        gres=diagnosis_resource("gres"),
        train_slots=diagnosis_resource("train_slots"),
    params:
        step=step,
        spec=diagnosis_spec,
    shell:
        "{params.step} --log {log} diagnose {params.spec} --checkpoint {input.checkpoint} --source {input.source}"
        " --manifest {output.manifest}"


rule diagnostics:
    input:
        diagnoses=lambda wildcards: diagnoses_of(wildcards.experiment),
    output:
        named="experiments/{experiment}/diagnostics.json",
    log:
        "logs/diagnostics/{experiment}.log",
    conda:
        "../envs/environment.yaml"
    params:
        step=step,
    shell:
        "{params.step} --log {log} diagnose.link --experiment {wildcards.experiment} --diagnoses {input.diagnoses}"
        " --output {output.named}"
