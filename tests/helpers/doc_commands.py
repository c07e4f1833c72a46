"""Runs the code blocks of the documentation pages, with stubs for the commands."""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import yaml
from markdown_it import MarkdownIt

# Commands of the pages that tests can't run, with the reason. Stubs only record their arguments.
NOT_RUN = {
    "cmake": "builds llama.cpp, which is not installed",
    "cp": "copies the folder of a run, which no test of the page trains",
    "curl": "sends a request: test_docs does that if a server runs; otherwise it needs the network",
    "docker": "needs a registry and root",
    "envsubst": "its output is only for kubectl",
    "gcloud": "needs a Google Cloud account",
    "git": "clones llama_jax or llama.cpp",
    "hostname": "runs on a cluster",
    "journalctl": "reads the log of a host of a pod",
    "kubectl": "needs a cluster",
    "llama-cli": "belongs to llama.cpp, which is not installed",
    "lm_eval": "belongs to lm-evaluation-harness, which needs a running server here",
    "mpirun": "needs Open MPI and a cluster; the stub runs the command in its arguments",
    "openssl": "generates a secret, which no test needs",
    "pip": "installs packages; .ci/run tests the README's command",
    "pytest": "runs these tests",
    "python": "runs a benchmark, whose file must exist, or a script of llama.cpp (not installed)",
    "python3.12": "creates a virtual environment on a cluster",
    "sbatch": "needs SLURM",
    "scontrol": "needs SLURM",
    "sh": "runs the script that curl would fetch",
    "srun": "needs SLURM; the stub runs the command in its arguments",
    "sphinx-build": "builds the site, as .ci/run does",
    "sudo": "needs root",
    "tar": "unpacks the archive that git would create",
    "uv": "installs on a host of a pod",
    "vllm": "needs vLLM and a GPU",
}
PLAIN = ("bash", "cat", "grep", "mkdir")  # the real commands

# Records its arguments; if they contain a command, executes that.
# Commands of a pipe run side by side. bash writes one line at once, so a call is one line: \x1f is
# between its words, and \x1e is a line break in a word.
_STUB = """\
#!/bin/bash
call=${0##*/}
for word; do call+=$'\\x1f'$word; done
printf '%s\\n' "${call//$'\\n'/$'\\x1e'}" >> "$CALLS"
[ -p /dev/stdin ] && cat > /dev/null
case "${0##*/} $1" in
  "llama-jax info") echo "(finished)" ;;
  "llama-jax "*) ;;
  *)
    for word; do
      case $word in
        --command=*) exec bash -c "${word#--command=}" ;;
        bash | llama-jax | */llama-jax) exec "$@" ;;
      esac
      shift
    done ;;
esac
exit 0
"""
_UNKNOWN = """command_not_found_handle() { printf 'unknown\\x1f%s\\n' "$1" >> "$CALLS"; }\n"""


class Block(NamedTuple):
    """A code block. A shell block has the language ''; its first comment may name a file."""

    language: str
    text: str
    file: str | None


def code_blocks(page: Path) -> list[Block]:
    """Returns the code blocks of a Markdown page, in order."""
    blocks = []
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            language = token.info.replace("bash", "")
            name = re.match(r"(?:#!.*\n)?# ([\w.-]+\.\w+)\b", token.content)
            blocks.append(Block(language, token.content, name and name[1]))
    return blocks


def inline_commands(page: Path) -> list[str]:
    """Returns the complete `llama-jax` commands in the text of a page, outside its code blocks."""
    inline = [t for t in MarkdownIt().parse(page.read_text()) for t in t.children or []]
    codes = (t.content for t in inline if t.type == "code_inline")
    return [c for c in codes if re.match(r"llama-jax \S+ \S", c) and "…" not in c]


class PageRunner:
    """Saves the files of a page in a folder, and runs its code blocks there.

    The commands are stubs that record their arguments.
    """

    def __init__(self, folder: Path, page: list[Block]):
        self.folder = folder
        for block in page:
            if block.file:
                (folder / block.file).write_text(block.text)
        bin_ = folder / ".venv" / "bin"
        bin_.mkdir(parents=True)
        for name in (*NOT_RUN, "llama-jax"):
            (bin_ / name).write_text(_STUB)
            (bin_ / name).chmod(0o755)
        for name in PLAIN:
            target = next(p for p in (f"/bin/{name}", f"/usr/bin/{name}") if os.path.exists(p))
            (bin_ / name).symlink_to(target)
        # The paths in the pages: on a host of a pod, and in llama.cpp's folder.
        for parent in (".local", "llama_jax/.venv", "llama.cpp/build"):
            (folder / parent).mkdir(parents=True)
            (folder / parent / "bin").symlink_to(bin_)
        (folder / ".unknown").write_text(_UNKNOWN)
        self._environment = {
            "PATH": str(bin_), "HOME": str(folder), "USER": "me", "CALLS": str(folder / ".calls"),
            "BASH_ENV": str(folder / ".unknown"),
            "OMPI_COMM_WORLD_SIZE": "64", "OMPI_COMM_WORLD_RANK": "0", "SLURM_JOB_ID": "1",
        }  # fmt: skip

    def run_shell(self, shell: str) -> list[list[str]]:
        """Runs a shell block and returns the commands that it executed, each with its arguments."""
        calls = self.folder / ".calls"
        calls.write_text("")
        done = subprocess.run(
            ["/bin/bash", "-c", shell], cwd=self.folder, env=self._environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, (shell, done.stderr)
        lines = calls.read_text().split("\n")[:-1]
        return [line.replace("\x1e", "\n").split("\x1f") for line in lines]

    def run_block(self, block: Block) -> list[list[str]]:
        """Runs a shell block, or the script in a JobSet; returns the commands that it executed."""
        if block.language == "":
            return self.run_shell(block.text)
        if block.language == "yaml" and "kind: JobSet" in block.text:
            job = yaml.safe_load(block.text)["spec"]["replicatedJobs"][0]["template"]["spec"]
            [container] = job["template"]["spec"]["containers"]
            assert container["command"] == ["bash", "-c"]
            script = container["args"][0].replace("$BUCKET", "my-llama")  # as envsubst does
            return self.run_shell(script)
        return []
