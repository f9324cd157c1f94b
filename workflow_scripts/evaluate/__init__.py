"""The step `evaluate`: what a checkpoint answers."""
