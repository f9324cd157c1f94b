"""Annotations and scans put together into one mixture: reading, joining, policies, choosing, writing."""
