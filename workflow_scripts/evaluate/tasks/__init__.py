"""The kinds of evaluation task, the only list of them: a file in this room and a line here are a new kind."""

from __future__ import annotations

from workflow_scripts.evaluate.tasks.shapes import SHAPES

TASKS = {task.name: task for task in (SHAPES,)}
