"""What a scan asks for follows from the number and the size of its images."""

from tests.support.workspace import ROOT
from workflow_scripts.io import write_json
from workflow_scripts.plan.plan import read_plan
from workflow_scripts.plan.resources import STEP_JOBS
from workflow_scripts.plan.scans import scan_job

FULL = read_plan([ROOT / "config/llava-v1.5-7b.yaml"])


def test_larger_sources_get_more_cpus_and_the_time_for_what_is_left(tmp_path):
    jobs = {name: scan_job(FULL, name, tmp_path) for name in FULL.scanned()}
    assert 1 < jobs["textvqa"].threads < jobs["coco"].threads <= STEP_JOBS["scan"].threads
    for name, job in jobs.items():
        spec = FULL.config.sources[name]
        size = spec.remote()[-1].bytes or spec.remote()[-1].about_gb * 1e9
        cpu_minutes = max(spec.expected_images or 0, size / 50_000) / 100 / 60
        estimate = 4 * cpu_minutes / job.threads
        assert 30 + estimate <= job.runtime <= 32 + estimate, name
    demo = read_plan([ROOT / "config/config.yaml"])
    for name in demo.scanned():
        small = scan_job(demo, name, tmp_path)
        assert small.threads == 1 and small.runtime < 35


def test_what_lies_there_counts_more_than_what_was_written(tmp_path):
    source = tmp_path / "data/sources/textvqa"
    source.mkdir(parents=True)
    with (source / "big.zip").open("wb") as archive:
        archive.truncate(10**12)  # sparse: takes no space
    write_json(source / "manifest.json", {"images": {"path": "big.zip", "type": "zip"}})
    assert scan_job(FULL, "textvqa", tmp_path).threads == STEP_JOBS["scan"].threads
    assert scan_job(FULL, "textvqa", tmp_path).runtime > 24 * 60


def test_unknown_sizes_get_the_most_that_is_usual(tmp_path):
    plan = read_plan([ROOT / "config/llava-v1.5-7b.yaml"])
    spec = plan.config.sources["textvqa"]
    files = [file.model_copy(update={"bytes": None, "about_gb": None}) for file in spec.files]
    plan.config.sources["textvqa"] = spec.model_copy(update={"files": files, "expected_images": None})
    assert scan_job(plan, "textvqa", tmp_path) == STEP_JOBS["scan"]
