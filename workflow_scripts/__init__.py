"""The steps of the workflow: each module is importable, typed, and runs as ``python -m
workflow_scripts.<name>``.
"""
