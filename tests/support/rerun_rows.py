"""The table of docs/reruns.md as tests: what was changed, what runs again. Used on one machine and on
Slurm.
"""

import re
import sys

from tests.support.workspace import copy_code
from workflow_scripts import code_version

# What follows from a new stage 2 of one experiment, and from new data or models for all.
SCORED = {"score", "evaluation", "compare", "report"}
AFTER_FINETUNE = {"finetune", "export", "predict", "checkpoint", *SCORED}


def lines(rule, experiments, workspace):
    """`rule: output` of a rule for some experiments."""
    plan = workspace.plan()
    if rule == "checkpoint":
        return {f"checkpoint: experiments/{name}/checkpoint.json" for name in experiments}
    if rule == "report":
        return {"report: report/index.html"}
    if rule == "compare":
        chosen = set(plan.comparisons() if plan.baseline in experiments else experiments)
        return {f"compare: experiments/{name}/comparison.json" for name in chosen & set(plan.comparisons())}
    evaluations = [item for name in experiments for item in plan.evaluations_of(name)]
    if rule == "evaluation":
        return {f"evaluation: {item.named}" for item in evaluations}
    if rule in ("predict", "score"):
        return {f"{rule}: {getattr(item, rule).manifest}" for item in evaluations}
    return {f"{rule}: {plan.run(rule, name).manifest}" for name in experiments}


def surveys(workspace, *mixtures):
    """`survey: output` of every survey of these mixtures."""
    found = workspace.plan().surveys.values()
    return {f"survey: {survey.manifest}" for survey in found if survey.mixture in mixtures}


def expected(workspace, rules, experiments):
    return set().union(*(lines(rule, experiments, workspace) for rule in rules))


def nothing(workspace):
    return set()


def touched(workspace):
    """Touch the data files, the manifests and the code's configuration."""
    paths = [
        "mine/images.tar",
        "mine/questions.json",
        "data/sources/captions/manifest.json",
        "models/llm/manifest.json",
    ]
    for path in [*paths, *(str(item) for item in workspace.folder.glob("runs/*/*/manifest.json"))]:
        (workspace.folder / path).touch()
    return set()


def stage_2_rate(workspace):
    workspace.config["experiments"]["gentle"]["finetune"]["learning_rate"] = 2e-3
    return expected(workspace, AFTER_FINETUNE, ["gentle"])


def stage_1_rate(workspace):
    workspace.config["experiments"]["compress_4"]["pretrain"] = {"learning_rate": 1e-3}
    return expected(workspace, AFTER_FINETUNE | {"pretrain"}, ["compress_4"])


def one_flag(workspace):
    workspace.config["experiments"]["compress_4"]["interventions"]["final_spatial_size"] = 1
    other_tokens = surveys(workspace, "pretrain", "finetune")
    return other_tokens | expected(workspace, AFTER_FINETUNE | {"pretrain"}, ["compress_4"])


def longer_samples(workspace):
    workspace.config["experiments"]["compress_4"]["finetune"] = {"model_max_length": 240}
    [new] = set(workspace.plan().surveys) - {item.parent.name for item in made_surveys(workspace)}
    # the one that it has left looks at one layout less
    both = {f"survey: {workspace.plan().surveys[new].manifest}"} | surveys(workspace, "finetune")
    return both | expected(workspace, AFTER_FINETUNE, ["compress_4"])


def made_surveys(workspace):
    return workspace.folder.glob("data/surveys/*/manifest.json")


def survey_bounds(workspace):
    """What may be found decides nothing about a result: no training is looked at again."""
    workspace.config["stages"]["finetune"]["survey"] = {"max_cut_share": 0.5}
    return surveys(workspace, "finetune") | lines("report", [], workspace)


def prompt(workspace):
    workspace.config["evaluation"]["tasks"]["shapes"]["prompt_suffix"] = " Answer shortly."
    return expected(workspace, {"predict", *SCORED}, workspace.config["experiments"])


def metric(workspace):
    workspace.config["evaluation"]["tasks"]["shapes"].update(metric="choice_letter", max_unparsed_share=1)
    return expected(workspace, SCORED, workspace.config["experiments"])


def batch_and_shards(workspace):
    workspace.config["evaluation"]["tasks"]["shapes"].update(batch_size=3, shards=4, runtime_min=5)
    return set()


def diagnostics_switched_on(workspace):
    workspace.config["diagnostics"] = {"batch_size": 2, "runtime_min": 5}
    plan = workspace.plan()
    looked = {f"diagnose: {item.run.manifest}" for item in plan.diagnoses.values()}
    named = {f"diagnostics: experiments/{name}/diagnostics.json" for name in plan.diagnosed()}
    return looked | named | lines("report", [], workspace)


def new_experiment(workspace):
    workspace.config["experiments"]["normalize"] = {"interventions": {"normalize_projector": True}}
    return expected(workspace, AFTER_FINETUNE | {"pretrain"}, ["normalize"])


def caption_policy(workspace):
    part = workspace.config["mixtures"]["pretrain"]["parts"][0]
    part["policy"]["truncated"] = "drop"
    every = list(workspace.config["experiments"])
    data = {"mixture: data/mixtures/pretrain/manifest.json"} | surveys(workspace, "pretrain")
    return data | expected(workspace, AFTER_FINETUNE | {"pretrain"}, every)


def mixture_weight(workspace):
    workspace.config["mixtures"]["finetune"]["parts"][0]["weight"] = 0.5
    every = list(workspace.config["experiments"])
    data = {"mixture: data/mixtures/finetune/manifest.json"} | surveys(workspace, "finetune")
    return data | expected(workspace, AFTER_FINETUNE, every)


def replaced_data(workspace):
    """Another file under the same name: what depends on it is looked at again."""
    path = workspace.folder / "mine/questions.json"
    path.write_text(re.sub("What colour", "Which colour", path.read_text(), count=3) + "\n")
    every = list(workspace.config["experiments"])
    data = {
        "acquire: data/sources/questions/manifest.json",
        "scan: data/scans/questions/manifest.json",
        "mixture: data/mixtures/finetune/manifest.json",
    }
    return data | surveys(workspace, "finetune") | expected(workspace, AFTER_FINETUNE, every)


def comment_in_code(workspace):
    code = workspace.code
    for name in ("llava_ext/training/trainer.py", "workflow_scripts/merge/step.py", "rules/train.smk"):
        path = code / name
        path.write_text(path.read_text() + "\n# a remark\n")
    return set()


def code_version_raised(workspace):
    path = workspace.code / "workflow_scripts/code_version.py"
    old, new = code_version.CODE_VERSION, code_version.CODE_VERSION + 1
    path.write_text(path.read_text().replace(f"CODE_VERSION = {old}\n", f"CODE_VERSION = {new}\n"))
    return  # every run has a new name: the caller counts rules


def mirrors_and_logging(workspace):
    workspace.config["stages"]["finetune"].update(logging_steps=2, save_steps=5, save_total_limit=3)
    workspace.config["sources"]["questions"]["expected_images"] = 100000
    workspace.config["mixtures"]["finetune"]["skip_samples"] = ["#1"]  # the row about records to leave out
    return {"acquire: data/sources/questions/manifest.json"} & set()


def number_of_gpus(workspace):
    workspace.config["compute"]["small"].update(
        processes_per_node=2, parallel="ddp", per_device_batch_size=4, mem_mb=3000
    )
    return set()


def site(workspace):
    workspace.config.update(setup="export NCCL_DEBUG=WARN", python=sys.executable)
    return set()


def description(workspace):
    workspace.config["experiments"]["vanilla"]["description"] = "as it was"
    return {"checkpoint: experiments/vanilla/checkpoint.json", "report: report/index.html"}


RERUN_NOTHING = {
    "nothing": nothing,
    "touch": touched,
    "batch size and shards of a task": batch_and_shards,
    "a comment in code": comment_in_code,
    "number of processes": number_of_gpus,
    "logging and saving": mirrors_and_logging,
    "setup and interpreter": site,
}
RERUN_SOMETHING = {
    "stage-2 learning rate of one experiment": stage_2_rate,
    "stage-1 learning rate of one experiment": stage_1_rate,
    "one flag": one_flag,
    "length of one experiment's samples": longer_samples,
    "bounds of a survey": survey_bounds,
    "a new experiment": new_experiment,
    "prompt of a task": prompt,
    "metric of a task": metric,
    "diagnostics switched on": diagnostics_switched_on,
    "caption policy": caption_policy,
    "mixture weight": mixture_weight,
    "a data file": replaced_data,
    "an experiment's description": description,
}
ROWS = RERUN_NOTHING | RERUN_SOMETHING


def check_row(finished, folder, *rows):
    """Copies the finished folder, makes the changes of some rows, and compares the plan with the table."""
    workspace = finished.copy_to(folder / "w")
    if finished.code != finished.folder and "a comment in code" in rows:
        workspace.code = copy_code(folder / "code")
    wanted = set().union(*(ROWS[row](workspace) for row in rows))
    assert set(workspace.planned()) == wanted


def check_raised_version(finished, folder, options=()):
    """With a higher code version every training gets a new name, and surveys are made again; data and models
    stay.
    """
    workspace = finished.copy_to(folder / "w")
    if finished.code != finished.folder:
        workspace.code = copy_code(folder / "code")
    code_version_raised(workspace)
    rules = [line.split(":")[0] for line in workspace.planned(*options)]
    counts = {rule: rules.count(rule) for rule in set(rules)}
    every = len(workspace.config["experiments"])
    trained = {"pretrain": 2, "report": 1} | dict.fromkeys(("finetune", "export", "checkpoint"), every)
    asked = dict.fromkeys(("predict", "score", "evaluation"), every) | {"compare": every - 1}
    assert counts == {"survey": 2} | trained | asked
