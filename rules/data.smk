# Data: fetch or draw, look at every image, merge, survey what training will see.


rule data:
    input:
        expand("data/mixtures/{mixture}/manifest.json", mixture=plan.config.mixtures),


rule acquire:
    input:
        lambda wildcards: lookup("sources", wildcards.source)
        and plan.source_files(wildcards.source),
    output:
        manifest="data/sources/{source}/manifest.json",
    log:
        "logs/acquire/{source}.log",
    retries: DOWNLOAD_RETRIES
    conda:
        "../envs/environment.yaml"
    params:
        step=step,
        recipe=lambda wildcards: compact(
            watched_recipe(wildcards.source, plan.config.sources[wildcards.source])
        ),
        # not tracked (it takes `output`): another mirror is no reason to fetch again
        spec=lambda wildcards, output: compact(
            plain(plan.config.sources[wildcards.source])
        ),
    shell:
        "{params.step} --log {log} acquire --name {wildcards.source} --spec {params.spec:q} --manifest {output.manifest}"


rule scan:
    input:
        source="data/sources/{source}/manifest.json",
    output:
        manifest="data/scans/{source}/manifest.json",
    log:
        "logs/scan/{source}.log",
    retries: ONCE_MORE
    conda:
        "../envs/environment.yaml"
    threads: lambda wildcards: scan_job(plan, wildcards.source).threads
    resources:
        mem_mb=STEP_JOBS["scan"].mem_mb,
        runtime=lambda wildcards, attempt: scan_job(plan, wildcards.source).runtime
        * attempt,
    params:
        step=step,
    shell:
        "{params.step} --log {log} scan --source {input.source} --manifest {output.manifest} --threads {threads}"


rule mixture:
    input:
        unpack(mixture_inputs),
    output:
        manifest="data/mixtures/{mixture}/manifest.json",
    log:
        "logs/mixture/{mixture}.log",
    retries: ONCE_MORE
    conda:
        "../envs/environment.yaml"
    resources:
        mem_mb=STEP_JOBS["mixture"].mem_mb,
        runtime=STEP_JOBS["mixture"].runtime,
    params:
        step=step,
        spec=lambda wildcards: compact(plan.mixture_spec(wildcards.mixture)),
    shell:
        "{params.step} --log {log} merge --name {wildcards.mixture} --spec {params.spec:q}"
        " --sources {input.sources} --scans {input.scans} --manifest {output.manifest}"


rule survey:
    input:
        unpack(survey_inputs),
    output:
        manifest="data/surveys/{survey}/manifest.json",
    log:
        "logs/survey/{survey}.log",
    retries: ONCE_MORE
    conda:
        "../envs/environment.yaml"
    threads: lambda wildcards: survey_threads(plan.config, surveyed(wildcards))
    resources:
        mem_mb=STEP_JOBS["survey"].mem_mb,
        runtime=STEP_JOBS["survey"].runtime,
    params:
        step=step,
        spec=lambda wildcards: compact(surveyed(wildcards).spec()),
        # not tracked (it takes `output`): trainings that are finished or under way need no new survey for it
        skip_samples=lambda wildcards, output: ",".join(
            plan.config.mixtures[surveyed(wildcards).mixture].skip_samples
        ),
    shell:
        "{params.step} --log {log} survey --name {wildcards.survey} --spec {params.spec:q} --mixture {input.mixture}"
        " --models {input.models} --manifest {output.manifest} --processes {threads} --skip_samples={params.skip_samples:q}"
