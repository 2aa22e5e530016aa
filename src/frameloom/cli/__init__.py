"""The command line: one command a verb, each a thin layer over the Python function of the same name."""
