"""The programming languages of files, by their names.

The 30 languages and their suffixes are those of CodeParrot's github-code
(https://huggingface.co/datasets/codeparrot/github-code).
"""

_SUFFIXES = {
    "Assembly": ".asm",
    "Batchfile": ".bat .cmd",
    "C": ".c .h",
    "C#": ".cs",
    "C++": ".cpp .hpp .c++ .h++ .cc .hh .C .H",
    "CMake": ".cmake",
    "CSS": ".css",
    "Dockerfile": ".dockerfile",
    "FORTRAN": ".f90 .f .f03 .f08 .f77 .f95 .for .fpp",
    "Go": ".go",
    "Haskell": ".hs",
    "HTML": ".html",
    "Java": ".java",
    "JavaScript": ".js",
    "Julia": ".jl",
    "Lua": ".lua",
    "Markdown": ".md .markdown",
    "PHP": ".php .php3 .php4 .php5 .phps .phpt",
    "Perl": ".pl .pm .pod .perl",
    "PowerShell": ".ps1 .psd1 .psm1",
    "Python": ".py",
    "Ruby": ".rb",
    "Rust": ".rs",
    "SQL": ".sql",
    "Scala": ".scala",
    "Shell": ".sh .bash .command .zsh",
    "TeX": ".tex",
    "TypeScript": ".ts .tsx",
    "Visual Basic": ".vb",
}
_BY_SUFFIX = {
    suffix: language for language, suffixes in _SUFFIXES.items() for suffix in suffixes.split()
}
_BY_NAME = {"Makefile": "Makefile", "Dockerfile": "Dockerfile", "CMakeLists.txt": "CMake"}


def code_language(path: str) -> str:
    """Returns the programming language of a file, "" if its name doesn't tell one of the 30."""
    name = path.rsplit("/", 1)[-1]
    suffix = "." + name.rsplit(".", 1)[1] if "." in name else ""
    return _BY_NAME.get(name) or _BY_SUFFIX.get(suffix) or _BY_SUFFIX.get(suffix.lower(), "")
