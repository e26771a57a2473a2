"""Pages that are made from the code are the ones that the code makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from powerd import apidoc, configdoc

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("file", "page"), [("configuration.md", configdoc.page), ("api.md", apidoc.page)])
def test_the_page_is_what_its_command_prints(file: str, page: object) -> None:
    assert callable(page)
    assert (DOCS / file).read_text() == page(), f"python -m powerd.{page.__module__.rpartition('.')[2]} > docs/{file}"
