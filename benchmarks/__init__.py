"""Every module in this folder is a benchmark: `python -m benchmarks.scan`; `python -m benchmarks` runs
them all.
"""
