"""The training: arguments, trainer, states, watchdogs."""
