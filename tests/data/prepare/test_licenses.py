"""Licences: from the texts of licence files and SPDX expressions to a decision."""

import re

import license_texts as texts
import pytest

from llama_jax.data.prepare.licenses import (
    is_allowed,
    is_license_file,
    license_of_files,
    recognize_license,
)

# Debian's own name of a licence, with the licence as a paragraph of its format.
DEBIAN_GO = texts.DEBIAN.replace("BSD-3-clause", "Go") + "\nLicense: Go\n" + texts.BSD_3.strip()
DEBIAN_GO = re.sub(r"\n\n(?=[^FL])", "\n .\n", DEBIAN_GO)

ALLOWED = ("MIT", "BSD", "Apache")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (texts.MIT, "MIT"),
        (texts.MIT.replace("\n", "\r\n# "), "MIT"),  # wrapped and quoted in another way
        (texts.BSD_2, "BSD-2-Clause"),
        (texts.BSD_3, "BSD-3-Clause"),
        (texts.BSD_4, "BSD-4-Clause"),
        (texts.APACHE, "Apache-2.0"),
        (texts.GPL, "GPL"),  # although it mentions the LGPL
        ("GNU LESSER GENERAL PUBLIC LICENSE, which supplements the GNU General …", "LGPL"),
        (texts.LINUX, "GPL-2.0 WITH Linux-syscall-note"),
        (texts.DEBIAN, "BSD-3-clause"),
        (texts.DEBIAN.replace("License: BSD-3-clause", "License: Expat or GPL-2"), "GPL-2 OR MIT"),
        (texts.DEBIAN.replace("BSD-3-clause", "Go"), "Go"),
        (DEBIAN_GO, "BSD-3-Clause"),
        ("# SPDX-License-Identifier: MIT OR Apache-2.0 */", "MIT OR Apache-2.0"),
        ("All rights reserved. Ask us.", ""),
        ("Our own terms. " * 300 + texts.MIT, ""),  # the licence of a part
    ],
)
def test_the_licence_of_a_file_is_recognized(text, name):
    assert recognize_license(text) == name


@pytest.mark.parametrize(
    ("path", "states_it"),
    [
        ("LICENSE", True),
        ("LICENCE.md", True),
        ("LICENSE-APACHE", True),
        ("MIT-LICENSE.txt", True),
        ("COPYING.LESSER", True),
        ("usr/share/doc/golang-src/copyright", True),
        ("src/LICENSE", False),
        ("license.py", False),
        ("licensed_works.txt", False),
        ("README", False),
    ],
)
def test_only_files_of_the_root_state_the_licence(path, states_it):
    assert is_license_file(path) is states_it


@pytest.mark.parametrize(
    ("files", "license_name"),
    [
        ({}, ""),
        ({"LICENSE": texts.MIT}, "MIT"),
        ({"LICENSE-MIT": texts.MIT, "LICENSE-APACHE": texts.APACHE}, "Apache-2.0 AND MIT"),
        ({"LICENSE": "See LICENSE.BSD.", "LICENSE.BSD": texts.BSD_2}, "BSD-2-Clause"),
        ({"LICENSE": texts.MIT, "COPYRIGHT": "A. Author\n" * 999}, "MIT"),
        ({"LICENSE": "Pay us. " * 999, "LICENSE.MIT": texts.MIT}, ""),
        ({"LICENSE": "Pay us."}, ""),
    ],
)
def test_all_licence_files_of_a_repository_count(files, license_name):
    assert license_of_files(files) == license_name


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("BSD-3-Clause", True),
        ("Apache-2.0 AND MIT", True),
        ("GPL-2.0 OR MIT", True),
        ("(Apache-2.0 OR MIT)", True),
        ("MIT/X11", True),
        ("GPL-2.0", False),
        ("MIT AND GPL-2.0", False),
        ("GPL-2.0 WITH Linux-syscall-note", False),
        ("LGPL-2.1", False),
        ("MITNFA", False),  # the beginning ends at a hyphen
        ("", False),
    ],
)
def test_an_expression_is_allowed_if_the_list_satisfies_it(expression, allowed):
    assert is_allowed(expression, ALLOWED) is allowed
