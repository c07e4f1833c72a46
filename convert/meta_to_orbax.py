"""Converts a Meta folder (params.json, consolidated.NN.pth) into a model folder of llama_jax.

    python convert/meta_to_orbax.py Llama-3.1-8B/original models/llama3.1-8b

All options: `llama-jax convert --help`. From Python:
`lj.convert_checkpoint(source, folder, to="orbax")`.
"""

import sys

from llama_jax.cli.main import main

sys.exit(main(["convert", "--to", "orbax", *sys.argv[1:]]))
