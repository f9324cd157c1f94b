"""Checkpoints: reading, writing, and the original LLaVA layout, both ways."""
