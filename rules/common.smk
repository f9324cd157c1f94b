# What all rules share: the checked configuration, the plan of runs, the command that starts a step.
import sys
from contextlib import contextmanager

from snakemake.exceptions import WorkflowError
from snakemake_interface_executor_plugins.settings import DeploymentMethod

from workflow_scripts.config.load import load_config
from workflow_scripts.config.yaml_files import check_files
from workflow_scripts.io import UserError
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.announce import announce
from workflow_scripts.plan.checks import (
    check_config_files,
    check_containers,
    check_executor,
    check_shared_files,
    check_targets,
)
from workflow_scripts.plan.questions import by_name, evaluation_python
from workflow_scripts.plan.describe import is_dry_run
from workflow_scripts.plan.source_keys import watched_recipe
from workflow_scripts.plan.specs import compact, plain
from workflow_scripts.plan.surveys import survey_threads
from workflow_scripts.launch.step import prepare
from workflow_scripts.plan.resources import STEP_JOBS, resources_of
from workflow_scripts.plan.scans import scan_job
from workflow_scripts.stages import STAGES, last_stage
from workflow_scripts.step import command


@contextmanager
def readable_errors():
    """Turns a mistake of the user into a message of Snakemake without a traceback."""
    try:
        yield
    except UserError as error:
        raise WorkflowError(str(error)) from None


with readable_errors():
    if workflow.modifier.is_main_snakefile():
        check_config_files(workflow.configfiles)
        check_files([Path(file) for file in workflow.configfiles])
    plan = Plan(load_config(config, workflow.configfiles))
    if workflow.modifier.is_main_snakefile():
        check_targets(plan, sys.argv[1:])
    if workflow.is_main_process:
        check_executor(sys.argv[1:])
    check_shared_files(
        [str(usage) for usage in workflow.storage_settings.shared_fs_usage]
    )
    if DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method:
        check_containers(plan)


def interpreter():
    """The configured Python; inside conda and containers theirs, otherwise the one that runs Snakemake."""
    elsewhere = {
        DeploymentMethod.CONDA,
        DeploymentMethod.APPTAINER,
        DeploymentMethod.ENV_MODULES,
    }
    inside = elsewhere & set(workflow.deployment_settings.deployment_method)
    return plan.config.python or ("python" if inside else sys.executable)


STEP = command(interpreter(), HERE, plan.config.setup)


def step(wildcards, output):
    """The command that starts a step. It takes `output`, so Snakemake does not track it: another interpreter,
    another setup or a moved clone is no reason to rerun."""
    return STEP


with readable_errors():
    deployed = workflow.deployment_settings.deployment_method
    LMMS_STEP = command(
        evaluation_python(
            plan,
            HERE,
            interpreter(),
            DeploymentMethod.CONDA in deployed,
            DeploymentMethod.APPTAINER in deployed,
            only_planned=is_dry_run(sys.argv),
        ),
        HERE,
        plan.config.setup,
    )


def lmms_step(wildcards, output):
    """The command that starts a step in the environment that has lmms-eval; not tracked either."""
    return LMMS_STEP


# A job that runs inside a cluster job must not multiply the outer retries.
RETRIES = 0 if workflow.remote_exec else plan.retries
DOWNLOAD_RETRIES = 0 if workflow.remote_exec else 2
# A step that was killed (memory, a node that went away) may do better; one that refuses says so twice.
ONCE_MORE = 0 if workflow.remote_exec else 1


wildcard_constraints:
    source="[^/]+",
    mixture="[^/]+",
    model="[^/]+",
    run="[^/]+",
    experiment="[^/]+",
    survey="[^/]+",
    questions="[^/]+",
    task="[^/]+",
    shard="[0-9]+",
    shards="[0-9]+",


def lookup(section, name):
    """The section's entry, or a message that says which there are."""
    entries = getattr(plan.config, section)
    if name not in entries:
        raise WorkflowError(
            f"{section} has no entry {name!r}; entries: {', '.join(sorted(entries))}"
        )
    return entries[name]


def own_checkpoint_files(model):
    """The files of a finished checkpoint in a folder of the user's: a replaced one makes it new."""
    if model.role != "checkpoint" or model.kind != "path":
        return []
    return sorted(
        str(path) for path in Path(model.path).expanduser().iterdir() if path.is_file()
    )


def source_manifest(name):
    return f"data/sources/{name}/manifest.json"


def scan_manifest(name):
    return f"data/scans/{name}/manifest.json"


def mixture_inputs(wildcards):
    """The manifests of the sources and of the scans that a mixture is made of."""
    annotations, images = lookup("mixtures", wildcards.mixture).source_names()
    return {
        "sources": [
            source_manifest(name) for name in dict.fromkeys([*annotations, *images])
        ],
        "scans": [scan_manifest(name) for name in images],
    }


def surveyed(wildcards):
    """The survey of that name, or a message that says which there are."""
    if wildcards.survey not in plan.surveys:
        raise WorkflowError(
            f"no training needs the survey {wildcards.survey!r}; surveys: {', '.join(sorted(plan.surveys))}"
        )
    return plan.surveys[wildcards.survey]


def survey_inputs(wildcards):
    """The manifests of the mixture and of the models that a survey looks at."""
    survey = surveyed(wildcards)
    return {
        "mixture": f"data/mixtures/{survey.mixture}/manifest.json",
        "models": [
            f"models/{name}/manifest.json" for name in (survey.llm, *survey.towers)
        ],
    }


def training(stage, run):
    """The experiment that stands for a training of this configuration."""
    return plan.experiments[owner(stage, run)]


def owner(stage, run):
    """The name of the experiment that stands for a run of this configuration, trained here or not."""
    try:
        return plan.owner(stage, run)
    except KeyError:
        known = ", ".join(plan.names(stage))
        raise WorkflowError(
            f"runs/{stage}/{run} belongs to no experiment of this configuration; runs of {stage}: {known}"
        )


def run_of(stage, experiment):
    """The manifest of the run that is an experiment's part in a stage."""
    lookup("experiments", experiment)
    return plan.run(stage, experiment).manifest


def checkpoint_inputs(wildcards):
    """The manifests of the runs that an experiment's checkpoint is the result of: of none but its export where
    it is not trained here."""
    stages = () if wildcards.experiment in plan.adopted else STAGES
    return {stage: run_of(stage, wildcards.experiment) for stage in (*stages, "export")}


def export_inputs(wildcards):
    """The training that is exported, or the models that a checkpoint not trained here is made from."""
    experiment = owner("export", wildcards.run)
    if experiment not in plan.adopted:
        return {"trained": plan.run(last_stage(), experiment).manifest}
    return {
        "models": [
            f"models/{name}/manifest.json" for name in plan.adopted[experiment].models
        ]
    }


def named_inputs(wildcards, input, resources):
    """A job's inputs as options under their names. Not tracked (it takes `resources`): the inputs are."""
    return " ".join(f"--{name} {input[name]}" for name in input.keys())


def training_inputs(stage):
    """A function of the wildcards: the mixture, its survey, the models and the parent of a training."""

    def inputs(wildcards):
        experiment = training(stage, wildcards.run)
        found = {
            "mixture": f"data/mixtures/{experiment.stage(stage).mixture}/manifest.json",
            "models": [
                f"models/{name}/manifest.json"
                for name in (experiment.model.llm, experiment.model.vision_tower)
            ],
        }
        # It has to be there, but says nothing that mixture and models do not: a new one is no reason to rerun.
        survey = plan.survey_of(stage, wildcards.run).manifest
        # Only of a finished training: Snakemake leaves a job out whose `ancient` input is made again, also
        # where its output is missing.
        done = Path(plan.run(stage, experiment.name).manifest).is_file()
        found["survey"] = ancient(survey) if done else survey
        parent = STAGES[stage].parent
        found["parent"] = plan.run(parent, experiment.name).manifest if parent else []
        return found

    return inputs


def training_resource(stage, name):
    """A function of the wildcards: one resource of a training, or None where it has none."""

    def value(wildcards):
        training(stage, wildcards.run)
        return resources_of(plan.compute(stage, wildcards.run))[name]

    return value


def training_of(job):
    """What the launcher makes of a training's job; None for other jobs, and where inputs can't be read."""
    if job.is_group() or job.rule.name not in STAGES:
        return None
    stage, run, parent = job.rule.name, job.wildcards.run, job.input.parent
    try:
        return prepare(
            plan.training_spec(stage, run),
            Path(job.input.mixture),
            [Path(model) for model in job.input.models],
            Path(parent) if parent else None,
            Path(job.output.manifest),
        )
    except (UserError, OSError, KeyError):
        return None


def training_spec(stage):
    """A function of the wildcards: what the launcher has to know about a training."""
    return lambda wildcards, resources: compact(
        plan.training_spec(stage, wildcards.run)
    )


def training_threads(stage):
    """A function of the wildcards: the CPUs of one process's machine."""
    return lambda wildcards: plan.compute(stage, wildcards.run).cpus
