"""A reader of our pages, who does what their blocks of code say."""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import yaml
from markdown_it import MarkdownIt

# Commands that stand in the pages and can't be run by tests; what they get is noted alone.
NOT_RUN = {
    "cmake": "builds llama.cpp, which is not here",
    "curl": "asks a server: test_docs does it where one runs; elsewhere it would need the network",
    "docker": "needs a registry and root",
    "envsubst": "hands its output to kubectl alone",
    "gcloud": "needs an account of Google's cloud",
    "gcsfuse": "mounts a bucket of Google's cloud",
    "git": "copies a repository, ours or llama.cpp's",
    "hostname": "is asked on a cluster",
    "journalctl": "reads the log of a host of a pod",
    "kubectl": "needs a cluster",
    "llama-cli": "is a part of llama.cpp, which is not here",
    "mountpoint": "is asked on a host of a pod",
    "mpirun": "needs Open MPI and a cluster; the command that it is given is followed",
    "openssl": "makes a secret, which no test needs",
    "pip": "installs; .ci/run does it with what the README says",
    "pytest": "is what runs this",
    "python": "runs a benchmark, which must be there, or a script of llama.cpp, which is not",
    "python3.12": "makes a virtual environment on a cluster",
    "sbatch": "needs SLURM",
    "scontrol": "needs SLURM",
    "sh": "runs what curl would have fetched",
    "srun": "needs SLURM; the command that it is given is followed",
    "sudo": "needs root",
    "tar": "unpacks what git would have packed",
    "uv": "installs on a host of a pod",
    "vllm": "needs vLLM and a GPU",
}
PLAIN = ("bash", "cat", "grep", "mkdir")  # run as they are

# Notes what it is given, and goes on with the command that it would start.
_STAND_IN = """\
#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" $'\\n' >> "$CALLS"
[ -p /dev/stdin ] && cat > /dev/null
case "${0##*/} $1" in
  "llama-jax info") echo "(finished)" ;;
  "llama-jax "*) ;;
  "mountpoint "*) exit 1 ;;  # so that it is mounted
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
_UNKNOWN = 'command_not_found_handle() { printf "%s\\0" unknown "$1" $\'\\n\' >> "$CALLS"; }\n'


class Block(NamedTuple):
    """A block of code. Its language is '' where it is a shell's; its head may name a file."""

    language: str
    text: str
    file: str | None


def code_blocks(page: Path) -> list[Block]:
    """Returns the blocks of code of a page in Markdown, in order."""
    made = []
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            language = token.info.replace("bash", "")
            name = re.match(r"(?:#!.*\n)?# ([\w.-]+\.\w+)\b", token.content)
            made.append(Block(language, token.content, name and name[1]))
    return made


def inline_commands(page: Path) -> list[str]:
    """Returns the commands of ours that stand in lines of text, where they are whole."""
    inline = [t for t in MarkdownIt().parse(page.read_text()) for t in t.children or []]
    codes = (t.content for t in inline if t.type == "code_inline")
    return [c for c in codes if re.match(r"llama-jax \S+ \S", c) and "…" not in c]


class PageRunner:
    """Saves the files of a page in a folder, and works there.

    The commands that it runs are stand-ins that note what they get.
    """

    def __init__(self, folder: Path, page: list[Block]):
        self.folder = folder
        for block in page:
            if block.file:
                (folder / block.file).write_text(block.text)
        bin_ = folder / ".venv" / "bin"
        bin_.mkdir(parents=True)
        for name in (*NOT_RUN, "llama-jax"):
            (bin_ / name).write_text(_STAND_IN)
            (bin_ / name).chmod(0o755)
        for name in PLAIN:
            where = next(p for p in (f"/bin/{name}", f"/usr/bin/{name}") if os.path.exists(p))
            (bin_ / name).symlink_to(where)
        # Where the pages have them: on a host of a pod, and below llama.cpp.
        for place in (".local", "llama_jax/.venv", "llama.cpp/build"):
            (folder / place).mkdir(parents=True)
            (folder / place / "bin").symlink_to(bin_)
        (folder / ".unknown").write_text(_UNKNOWN)
        self._environment = {
            "PATH": str(bin_), "HOME": str(folder), "USER": "me", "CALLS": str(folder / ".calls"),
            "BASH_ENV": str(folder / ".unknown"),
            "OMPI_COMM_WORLD_SIZE": "64", "OMPI_COMM_WORLD_RANK": "0", "SLURM_JOB_ID": "1",
        }  # fmt: skip

    def run_shell(self, shell: str) -> list[list[str]]:
        """Runs a block of shell and returns the commands that it came to, each with its words."""
        calls = self.folder / ".calls"
        calls.write_text("")
        done = subprocess.run(
            ["/bin/bash", "-c", shell], cwd=self.folder, env=self._environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, (shell, done.stderr)
        return [call.split("\0")[:-1] for call in calls.read_text().split("\n\0") if call]

    def run_block(self, block: Block) -> list[list[str]]:
        """Returns the commands of a block that is or holds a script."""
        if block.language == "":
            return self.run_shell(block.text)
        if block.language == "yaml" and "kind: JobSet" in block.text:
            job = yaml.safe_load(block.text)["spec"]["replicatedJobs"][0]["template"]["spec"]
            [container] = job["template"]["spec"]["containers"]
            assert container["command"] == ["bash", "-c"]
            return self.run_shell(container["args"][0])
        return []
