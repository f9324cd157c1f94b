"""The pieces of the report: what is collected, how data and results are told, the page's template."""
