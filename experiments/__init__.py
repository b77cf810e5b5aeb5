"""Scripts of the command line: `python -m experiments.NAME --help`."""

import gc

# Imports, vocabularies and traces make a million objects that stay. By default the collector looks
# at them again and again: a tenth of the time to a first token.
gc.set_threshold(50_000, 20, 100)
