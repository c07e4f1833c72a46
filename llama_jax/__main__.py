"""`python -m llama_jax` is the command line."""

import sys

from llama_jax.cli.main import main

sys.exit(main())
