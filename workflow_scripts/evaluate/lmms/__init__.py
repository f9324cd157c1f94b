"""Tasks, prompts and metrics of lmms-eval, in an environment of its own; runner and statistics are ours."""

VERSION = "0.7.3"
"""The release that questions and scores come from; part of the names of predictions."""
