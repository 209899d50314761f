"""What mkdocs calls while it builds the site: fills the reference pages from the code, and makes links to code pages.

A page has a line that ends in `<!-- generate: NAME -->` where a part from the code belongs; `PARTS` are their names.
mkdocs puts this folder on the path while it loads this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import commands
import fields
import method_pages
import networks
import sources
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

PARTS: dict[str, Callable[[], str]] = {
    "commands": commands.commands,
    "launchers": commands.launchers,
    "study": fields.study,
    "budget": fields.budget,
    "budgets": fields.shipped_budgets,
    "dataset": fields.dataset,
    "spec": fields.spec,
    "result": fields.result,
    "measures": fields.measures,
    "options": commands.options,
    "environment": commands.environment,
    "methods": method_pages.methods_by_name,
    "heads": networks.heads,
    "backbones": networks.backbones,
    "attach points": networks.attach_points,
}
_MARKER = re.compile(r"^\*`make docs`[^\n]*<!-- generate: ([\w ]+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file outside of `docs` that a page links to."""
    for page in sources.linked_files(Path(config.docs_dir)):
        files.append(sources.page_of(page, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its generated parts, and with links to code that lead to pages of the site."""
    markdown = _MARKER.sub(lambda found: PARTS[found[1]](), markdown)
    return sources.relinked(markdown, page.file.src_uri, Path(config.docs_dir))
