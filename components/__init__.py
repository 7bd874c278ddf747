""" What the scripts share, one concept per file. README.md says where to change what. """
import os
import sys

# How long a CPU thread of torch spins before it sleeps, while it waits for the others; libgomp
# reads this when torch is imported. By default threads keep their cores busy: as soon as another
# program needs one, each waits for threads that cannot run, and a step of a small model takes many
# times as long.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

# a character that the encoding of a terminal or pipe lacks is printed as '?'; stderr escapes it
if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='replace')
