"""The typed configuration: everything that can be said in a config file, checked before anything runs."""
