# What the rules of diagnostics share.


def diagnosed(run):
    """The task (name, section) of a diagnosis of this configuration."""
    return evaluated("diagnose", run)


def diagnosis_inputs(wildcards):
    """The checkpoint and the questions that are looked at."""
    task, _ = diagnosed(wildcards.run)
    experiment = owner("diagnose", wildcards.run)
    return {
        "checkpoint": plan.run("export", experiment).manifest,
        "source": plan.questions_manifest(task),
    }


def diagnosis_resource(name):
    """A function of the wildcards: one resource of a job that looks into a checkpoint."""

    def value(wildcards):
        diagnosed(wildcards.run)
        return plan.single_job("diagnose", wildcards.run)[name]

    return value


def diagnosis_runtime(wildcards):
    """Minutes of a job that looks into a checkpoint."""
    diagnosed(wildcards.run)
    return plan.config.diagnostics.runtime_min


def diagnosis_spec(wildcards, resources):
    """The arguments that say what is looked at. Not tracked (they take `resources`): what matters is in the key."""
    name, spec = diagnosed(wildcards.run)
    section = shlex.quote(compact(plain(plan.config.diagnostics)))
    return f"--name {name} --spec {section} --task {shlex.quote(compact(plain(spec)))}"


def diagnoses_of(experiment):
    """The manifests of an experiment's diagnoses, or a message that there are none."""
    lookup("experiments", experiment)
    found = [item.run.manifest for item in plan.diagnoses_of(experiment)]
    if not found:
        raise WorkflowError(
            f"experiments.{experiment} has no diagnostics; add the section diagnostics: {{}}"
        )
    return found
