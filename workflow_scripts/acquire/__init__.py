"""The step `acquire`: fetches, draws or looks at a source."""
