"""Builds the pages of this folder as a site: `sphinx-build -W docs build/site`.

The pages are the Markdown files that GitHub shows. index.md orders them.
"""

import os
import subprocess
import sys

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

import llama_jax

project, copyright = "llama_jax", "the authors of llama_jax, Apache 2.0"
version = release = llama_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title = "furo", f"llama_jax {version}"
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_show_sphinx = html_copy_source = False
highlight_language = "bash"  # of blocks without a language

myst_heading_anchors = 4  # as GitHub does: links to a heading are checked
nb_execution_mode = "off"  # the stored outputs are shown; .ci/run executes the notebook
nitpicky = False  # the types in signatures link to no other project
default_role = "code"  # docstrings write `code` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True


class CommandHelp(Directive):
    """`{command-help} COMMAND` shows the manual page that `llama-jax COMMAND --help` prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "llama_jax", self.arguments[0], "--help"]
        environment = os.environ | {"COLUMNS": "100"}
        text = subprocess.check_output(command, env=environment, text=True)
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> None:
    app.add_directive("command-help", CommandHelp)
