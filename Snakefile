# From public data to trained LLaVA checkpoints. Each rule runs one step of workflow_scripts/; the graph is drawn in
# docs/architecture.md. `snakemake` alone runs the demo of config/config.yaml.
from pathlib import Path

from snakemake.utils import min_version

from workflow_scripts.acquire.signals import end_downloads_with_snakemake
from workflow_scripts.configs_seen import remember
from workflow_scripts.launch import requeue, snakemakes
from workflow_scripts.launch.accounts import use_default_account
from workflow_scripts.launch.retries import spare_vain_attempts
from workflow_scripts.plan.describe import describe_plan, is_dry_run
from workflow_scripts.selftest.start import check_start
from workflow_scripts.status.failures import say_failures
from workflow_scripts.status.messages import explain_failures
from workflow_scripts.status.queue import watch_queue

min_version("9.0")

HERE = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).resolve()

# A configuration file on the command line replaces the demo's instead of being mixed into it.
if not workflow.overwrite_configfiles:

    configfile:
        "config/config.yaml"
        if Path("config/config.yaml").is_file()
        else str(HERE / "config/config.yaml")


# Only with `--sdm apptainer`: see envs/apptainer.def.
container: "envs/llava.sif"


include: "rules/common.smk"
include: "rules/common_evaluate.smk"
include: "rules/data.smk"
include: "rules/models.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/common_diagnose.smk"
include: "rules/diagnose.smk"
include: "rules/results.smk"


if workflow.is_main_process:
    if is_dry_run(sys.argv):
        print(describe_plan(plan), file=sys.stderr)
    else:
        with readable_errors():
            snakemakes.enter(unlock="--unlock" in sys.argv)


localrules:
    all,
    data,
    acquire,
    prepare_model,
    checkpoint,
    score,
    evaluation,
    compare,
    diagnostics,
    report,
    list_unused,
    clean_unused,


rule all:
    default_target: True
    input:
        expand("experiments/{experiment}/checkpoint.json", experiment=plan.checkpoints),
        "report/index.html",


# Not called in dry runs, nor inside jobs.
onstart:
    with readable_errors():
        check_start(workflow, plan)
    remember(
        Path.cwd(),
        workflow.configfiles,
        workflow.config_settings.config,
        plan.used_folders(),
    )
    use_default_account(workflow)
    snakemakes.beat()
    requeue.watch(workflow)
    spare_vain_attempts(workflow, training_of)
    watch_queue(workflow, Path())
    explain_failures(workflow, Path())
    end_downloads_with_snakemake()


onsuccess:
    announce(plan)


# Its lines are Snakemake's last ones.
onerror:
    say_failures(Path(), plan.by_name)
