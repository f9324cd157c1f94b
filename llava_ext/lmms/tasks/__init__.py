"""No task of ours: lmms-eval looks for some in every plug-in."""
