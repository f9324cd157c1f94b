"""The demo's pictures and models, made from nothing."""
