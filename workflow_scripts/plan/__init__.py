"""The plan: which runs a configuration asks for, what they need, what they are called."""
