"""What lmms-eval asks a plug-in for."""

AVAILABLE_MODELS = {"spatial_llava": "SpatialLlava"}
"""Name on its command line, and the class in the module of that name."""
