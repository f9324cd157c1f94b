"""The step `prepare_model`: a checked copy of a model folder."""
