"""The step `scan`: looks at every image of a source."""
