# The two training stages. The run's key stands in the path, so nothing about it is tracked a second time: `spec` takes
# `resources` and is therefore no rerun trigger, and another number of GPUs continues a run instead of repeating it.


rule pretrain:
    input:
        unpack(training_inputs("pretrain")),
    output:
        manifest="runs/pretrain/{run}/manifest.json",
    log:
        "logs/pretrain/{run}.log",
    priority: 10
    retries: RETRIES
    conda:
        "../envs/environment.yaml"
    threads: lambda wildcards: plan.compute("pretrain", wildcards.run).cpus
    resources:
        mem_mb=training_resource("pretrain", "mem_mb"),
        runtime=training_resource("pretrain", "runtime"),
        nodes=training_resource("pretrain", "nodes"),
        gres=training_resource("pretrain", "gres"),
        mpi=training_resource("pretrain", "mpi"),
        tasks=training_resource("pretrain", "tasks"),
        tasks_per_gpu=training_resource("pretrain", "tasks_per_gpu"),
        slurm_extra=training_resource("pretrain", "slurm_extra"),
        train_slots=training_resource("pretrain", "train_slots"),
    params:
        step=step,
        spec=lambda wildcards, resources: compact(
            plan.training_spec("pretrain", wildcards.run)
        ),
    shell:
        "{params.step} --log {log} launch --spec {params.spec:q} --mixture {input.mixture} --models {input.models}"
        " --manifest {output.manifest}"


rule finetune:
    input:
        unpack(training_inputs("finetune")),
    output:
        manifest="runs/finetune/{run}/manifest.json",
    log:
        "logs/finetune/{run}.log",
    # before exports and evaluations: the longest jobs decide when everything is done
    priority: 5
    retries: RETRIES
    conda:
        "../envs/environment.yaml"
    threads: lambda wildcards: plan.compute("finetune", wildcards.run).cpus
    resources:
        mem_mb=training_resource("finetune", "mem_mb"),
        runtime=training_resource("finetune", "runtime"),
        nodes=training_resource("finetune", "nodes"),
        gres=training_resource("finetune", "gres"),
        mpi=training_resource("finetune", "mpi"),
        tasks=training_resource("finetune", "tasks"),
        tasks_per_gpu=training_resource("finetune", "tasks_per_gpu"),
        slurm_extra=training_resource("finetune", "slurm_extra"),
        train_slots=training_resource("finetune", "train_slots"),
    params:
        step=step,
        spec=lambda wildcards, resources: compact(
            plan.training_spec("finetune", wildcards.run)
        ),
    shell:
        "{params.step} --log {log} launch --spec {params.spec:q} --mixture {input.mixture} --models {input.models}"
        " --parent {input.parent} --manifest {output.manifest}"
