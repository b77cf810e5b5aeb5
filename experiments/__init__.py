"""Scripts of the command line: `python -m experiments.NAME --help`."""
