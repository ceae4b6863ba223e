"""docs/dependencies.md is what is installed, and nothing comes along under a licence that nobody expects."""

from __future__ import annotations

import re

from tools import dependencies_page

# MPL-2.0 is copyleft of a file, and binds who changes certifi or tqdm itself.
ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "LLVM-exception",
    "MIT",
    "MIT-CMU",
    "MPL-2.0",
    "PSF-2.0",
    "Zlib",
}


def test_dependencies_page_is_up_to_date() -> None:
    assert dependencies_page.PAGE.read_text() == dependencies_page.render_page(), "python -m tools.dependencies_page"


def test_no_licence_is_unexpected() -> None:
    found = dependencies_page.closure()
    assert found.keys() >= {"torch", "transformers", "certifi"}
    for name, licence in found.items():
        unexpected = set(re.split(r" AND | OR | WITH |[()]", licence)) - ALLOWED - {""}
        assert not unexpected, f"{name}: {unexpected}"
