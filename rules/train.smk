# The training stages, one rule each. The run's key stands in the path, so nothing about it is tracked a second time: `spec`
# takes `resources` and is therefore no rerun trigger, and another number of GPUs continues a run instead of repeating it.


# The loop has ended when a shell command is put together, so it must not name the stage.
for stage in STAGES.values():

    rule:
        name:
            stage.name
        input:
            unpack(training_inputs(stage.name)),
        output:
            manifest=f"runs/{stage.name}/{{run}}/manifest.json",
        log:
            f"logs/{stage.name}/{{run}}.log",
        priority: stage.priority
        retries: RETRIES
        conda:
            "../envs/environment.yaml"
        threads: training_threads(stage.name)
        resources:
            mem_mb=training_resource(stage.name, "mem_mb"),
            runtime=training_resource(stage.name, "runtime"),
            nodes=training_resource(stage.name, "nodes"),
            gres=training_resource(stage.name, "gres"),
            mpi=training_resource(stage.name, "mpi"),
            tasks=training_resource(stage.name, "tasks"),
            tasks_per_gpu=training_resource(stage.name, "tasks_per_gpu"),
            slurm_extra=training_resource(stage.name, "slurm_extra"),
            train_slots=training_resource(stage.name, "train_slots"),
        params:
            step=step,
            spec=training_spec(stage.name),
        shell:
            "{params.step} --log {log} launch --spec {params.spec:q} --mixture {input.mixture} --survey {input.survey}"
            " --models {input.models} --parent {input.parent} --manifest {output.manifest}"
