# Models: a prepared copy of each, with the generation config mended.


rule prepare_model:
    input:
        lambda wildcards: own_checkpoint_files(lookup("models", wildcards.model)),
    output:
        manifest="models/{model}/manifest.json",
    log:
        "logs/prepare_model/{model}.log",
    retries: DOWNLOAD_RETRIES
    conda:
        "../envs/environment.yaml"
    resources:
        mem_mb=4000,
    params:
        step=step,
        spec=lambda wildcards: compact(plain(lookup("models", wildcards.model))),
    shell:
        "{params.step} --log {log} prepare_model --name {wildcards.model} --spec {params.spec:q} --manifest {output.manifest}"
