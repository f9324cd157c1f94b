"""The parts of the self-test: the machine, what a configuration needs of it, the same on compute nodes."""
