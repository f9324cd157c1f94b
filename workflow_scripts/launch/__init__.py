"""The parts of the launcher: the command, who owns a training, its attempts, Slurm, checks before it,
provenance.
"""
