"""`python -m convert …` from a checkout is `llama-jax convert …`."""

import sys

from llama_jax.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
