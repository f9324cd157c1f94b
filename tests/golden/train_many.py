"""Runs several trainings of a JSON list of command lines one after the other, each through
``llava_ext.train.main``.
"""

import json
import sys

from llava_ext.train import main

for argv in json.loads(sys.stdin.read()):
    main(argv)
