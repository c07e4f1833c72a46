"""Runs the command line as `python -m llama_jax`."""

import sys

from llama_jax.cli.main import main

sys.exit(main())
