"""Recognizes licences: from the text of a licence file, and in SPDX expressions."""

import re
from collections.abc import Collection, Iterable, Mapping

# The first sentence of each licence's own terms, or its title, in the form of `_words`. The licence
# whose sentence comes first in a file is the file's licence: the GPL also mentions the LGPL.
_FIRST_SENTENCES = {
    "MIT": "permission is hereby granted free of charge to any person obtaining a copy of this"
    " software and associated documentation files the software to deal in the software without"
    " restriction",
    "BSD": "redistribution and use in source and binary forms with or without modification are"
    " permitted",
    "Apache-2.0": "version 2 0 january 2004 http www apache org licenses",
    "Apache-2": "licensed under the apache license version 2 0",
    "ISC": "permission to use copy modify and or distribute this software for any purpose with or"
    " without fee is hereby granted",
    "GFDL": "gnu free documentation license",
    "GPL": "gnu general public license",
    "LGPL": "gnu lesser general public license",
    "LGPL-2.0": "gnu library general public license",
    "AGPL": "gnu affero general public license",
    "MPL": "mozilla public license",
    "EPL": "eclipse public license",
    "CDDL": "common development and distribution license",
    "PSF-2.0": "python software foundation license version 2",
    "BSL-1.0": "boost software license",
    "Unlicense": "this is free and unencumbered software released into the public domain",
    "Artistic": "artistic license",
    "CC": "creative commons",
}
_BEGINNING = 2000  # characters; further on, a file lists the licences of other projects' parts
_POINTER = 1500  # characters; a file that names other files is shorter
_ADVERTISING = "all advertising materials mentioning features or use of this software must display"
_ENDORSEMENT = re.compile("used to endorse or promote products|neither the names? of")

_LICENSE_FILE = re.compile(
    r"(?i)(?:.*[-_.])?(?:licen[sc]es?|copying|copyright|unlicense)(?:[-_.].*)?"
)
_DEBIAN_FILE = re.compile(r"(?:.*/)?usr/share/doc/[^/]+/copyright")
_DEBIAN_NAMES = {"expat": "MIT"}
_NO_LICENSE = re.compile(
    r"(?i).*\.(?:py|c|h|cc|go|rs|js|ts|java|sh|rb|pl|json|ya?ml|html?|png|svg|in|tmpl)"
)


def is_license_file(path: str) -> bool:
    """Returns whether a file of a repository states the licence of all of it.

    Args:
        path: relative to the repository's root: `LICENSE-MIT`, `COPYING`; of a Debian package
            `usr/share/doc/NAME/copyright`.
    """
    if _DEBIAN_FILE.fullmatch(path):
        return True
    return (
        "/" not in path and bool(_LICENSE_FILE.fullmatch(path)) and not _NO_LICENSE.fullmatch(path)
    )


def recognize_license(text: str) -> str:
    """Returns the SPDX name of the licence that a licence file contains; "" if it is unknown.

    A name without a version ("GPL") stands for all of them. A file of Debian's machine-readable
    format (DEP 5) gives the licence of its paragraph `Files: *`, a file with an SPDX tag that of
    the tag.
    """
    if "www.debian.org/doc/packaging-manuals/copyright-format" in text[:500]:
        return _debian_license(text)
    if tag := re.search(r"SPDX-License-Identifier:[ \t]*(.+)", text[:_BEGINNING]):
        return tag[1].strip(" \t\r*/-")
    words = _words(text)
    found = {
        name: position
        for name, sentence in _FIRST_SENTENCES.items()
        if (position := words.find(sentence, 0, _BEGINNING + len(sentence))) >= 0
    }
    if not found:
        return ""
    name = min(found, key=lambda name: found[name])
    if name != "BSD":
        return name
    if _ADVERTISING in words:
        return "BSD-4-Clause"
    return "BSD-3-Clause" if _ENDORSEMENT.search(words) else "BSD-2-Clause"


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _debian_license(text: str) -> str:
    paragraphs = re.split(r"\n[ \t]*\n", text)

    def spdx_name(name: str) -> str:
        family = name.lower().split("-")[0]
        if family in _DEBIAN_NAMES or family in {n.lower().split("-")[0] for n in _FIRST_SENTENCES}:
            return _DEBIAN_NAMES.get(name.lower(), name)
        # Names of Debian's own ("Go" is a BSD licence) have a paragraph with their text.
        own = (p for p in paragraphs if re.match(rf"License:[ \t]*{re.escape(name)}[ \t]*\n", p))
        return recognize_license(next(own, "")) or name

    for paragraph in paragraphs:
        if re.search(r"(?m)^Files:[ \t]*\*[ \t]*$", paragraph) and (
            name := re.search(r"(?m)^License:[ \t]*(.+)$", paragraph)
        ):
            names = re.split(r"\s+or\s+", name[1].strip())
            return join_licenses(map(spdx_name, names), " OR ")
    return ""


def join_licenses(names: Iterable[str], operator: str = " AND ") -> str:
    """Returns one SPDX expression of several; an unknown licence ("") makes it unknown."""
    names = sorted(set(names))
    return operator.join(names) if all(names) else ""


def license_of_files(texts: Mapping[str, str]) -> str:
    """Returns the licence of a repository as an SPDX expression, "" if it is unknown.

    Each file must be recognized, except a short one beside others ("see LICENSE.MIT and
    LICENSE.APACHE"), and the list of copyright holders beside a licence. All licences apply: one
    that isn't allowed removes the repository.

    Args:
        texts: content of each licence file by name.
    """
    licenses = {name: recognize_license(text) for name, text in texts.items()}
    decisive = {
        name: license_name
        for name, license_name in licenses.items()
        if license_name or (len(texts[name]) > _POINTER and "copyright" not in name.lower())
    }
    return join_licenses(decisive.values())


def is_allowed(expression: str, allowed: Collection[str]) -> bool:
    """Returns whether an SPDX expression can be satisfied with the licences of a list.

    Args:
        expression: `MIT`, `bsd-3-clause`, `MIT OR GPL-2.0`, `MIT AND Apache-2.0`; parentheses are
            ignored, and AND binds more strongly.
        allowed: the beginnings of names, as far as a hyphen: BSD allows BSD-2-Clause.
    """
    prefixes = {name.lower() for name in allowed}

    def is_listed(name: str) -> bool:
        parts = name.strip(" ()").lower().split("-")
        return any("-".join(parts[:end]) in prefixes for end in range(1, len(parts) + 1))

    return any(
        all(is_listed(name) for name in re.split(r"(?i)\s+AND\s+|\s*,\s*", alternative))
        for alternative in re.split(r"(?i)\s+OR\s+|/", expression)
    )
