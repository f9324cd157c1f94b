"""The step `export`: a finished training for others."""
