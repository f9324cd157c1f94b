"""A plug-in of lmms-eval, found by its command line where `LMMS_EVAL_PLUGINS=llava_ext.lmms` is set."""
