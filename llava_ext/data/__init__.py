"""From samples to batches: conversations, images, assembly, order."""
