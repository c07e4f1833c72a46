"""Writes questions and answers about Python's standard library, from the library's own docstrings.

    python docs/stdlib_chats.py chats.jsonl

An answer is the signature of a function, method or class, and the first sentence of its docstring.
The texts are part of Python, under the licence of the Python Software Foundation.
"""

import ast
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

QUESTIONS = (
    "What does {name} do?",
    "Explain {name} in one sentence.",
    "How do I call {name}, and what is it for?",
    "Describe {name}.",
)


def documented(tree: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yields name with signature, and docstring, of the public definitions in a syntax tree."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        full = f"{name}.{node.name}"
        signature = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
        if isinstance(tree, ast.ClassDef):
            signature = re.sub(r"^\((self|cls)(, )?", "(", signature)
        if text := ast.get_docstring(node):
            yield full + signature, text
        if isinstance(node, ast.ClassDef):
            yield from documented(node, full)


def chats(library: Path) -> Iterator[dict[str, object]]:
    """Yields a chat for each public definition with a docstring, in the order of the files."""
    for path in sorted(library.rglob("*.py")):
        module = ".".join(path.relative_to(library).with_suffix("").parts)
        if re.search(r"(^|\.)(_|test|idlelib|lib2to3|site-packages)", module):
            continue
        tree = ast.parse(path.read_text("utf-8", "replace"))
        for signature, text in documented(tree, module.removesuffix(".__init__")):
            sentence = re.split(r"(?<=[.!?])\s|\n\s*\n", " ".join(text.split("\n\n")[0].split()))[0]
            if ">>>" in sentence or not 20 <= len(sentence) <= 200 or len(signature) > 120:
                continue
            name = signature.partition("(")[0]
            question = QUESTIONS[len(name) % len(QUESTIONS)].format(name=f"`{name}`")
            yield {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": f"`{signature}`: {sentence}"},
                ]
            }


if __name__ == "__main__":
    rows = list(chats(Path(sysconfig.get_path("stdlib"))))
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{sys.argv[1]}: {len(rows):,} chats")
