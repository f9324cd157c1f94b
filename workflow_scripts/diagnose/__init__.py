"""Looks into finished checkpoints: norms, attention, rotary positions."""
