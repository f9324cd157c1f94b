"""The forms of questions, the only list of them: a file in this room and a line here are a new form."""

from __future__ import annotations

from workflow_scripts.evaluate.tasks.lmms import LMMS
from workflow_scripts.evaluate.tasks.published import TWO_D_SHAPES
from workflow_scripts.evaluate.tasks.shapes import SHAPES
from workflow_scripts.evaluate.tasks.table import TABLE

TASKS = {task.name: task for task in (SHAPES, TWO_D_SHAPES, TABLE, LMMS)}
