"""Trainings that wait at a step. What a test does to a running training can't come too late then, however
busy the machine is, and the training may be short.

It waits behind so many steps of an attempt until the test lets it go on, or until a signal tells it to save
and end: then it takes one more step and ends as ever.
"""

from tests.support.workspace import wait_for

# Seconds that a test waits for what comes in seconds where nothing else runs; CI's machines are busy.
PATIENCE_S = 600
# Python runs it before anything else; the file of the metrics is opened right before the first step.
HOOK = """\
import sys

if "llava_ext.train" in sys.orig_argv:
    import time
    from pathlib import Path

    HOLD, LIMIT_S = Path(__file__).with_name("hold"), 1400
    opened, at = [], []

    def must_wait(steps):
        if not HOLD.exists():
            return False
        wanted, attempts = map(int, HOLD.read_text().split())
        begun = opened[0].with_name("attempts.jsonl").read_text().count('"started"')
        return steps == wanted and begun <= attempts

    def prepare(event, arguments):
        if event != "open" or opened or not str(arguments[0]).endswith("/metrics.jsonl"):
            return
        opened.append(Path(arguments[0]))
        from llava_ext.training import signals
        from transformers.trainer_callback import CallbackHandler

        go_on = CallbackHandler.on_step_begin

        def on_step_begin(self, args, state, control):
            at.append(state.global_step)
            if must_wait(at[-1] - at[0]):
                print("held behind step", state.global_step, file=sys.stderr, flush=True)
                end = time.monotonic() + LIMIT_S
                while HOLD.exists() and not signals.received and time.monotonic() < end:
                    time.sleep(0.05)
            return go_on(self, args, state, control)

        CallbackHandler.on_step_begin = on_step_begin

    sys.addaudithook(prepare)
"""


def hold(workspace, steps, attempts=1):
    """Has the first ``attempts`` of the folder's trainings wait behind ``steps`` steps of their own."""
    folder = workspace.folder / "held"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)
    (folder / "hold").write_text(f"{steps} {attempts}")
    workspace.config["setup"] = f"export PYTHONPATH={folder}"


def let_go(workspace):
    """They wait no longer."""
    (workspace.folder / "held/hold").unlink()


def wait_until_held(workspace, process=None, attempt=1):
    """The state folder of `long`, once this attempt waits."""
    folder = workspace.run_folder("finetune", "long")

    def state_if_held():
        for log in folder.glob(f"*/logs/attempt-{attempt:03d}.log"):
            if "held behind step" in log.read_text():
                return log.parent.parent
        return None

    return wait_for(state_if_held, PATIENCE_S, f"attempt {attempt} where it waits", process)
