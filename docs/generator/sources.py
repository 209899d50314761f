"""Pages for files outside of `docs` that pages link to, so that a link works in the repository and in the site."""

from __future__ import annotations

import os
import re
from pathlib import Path

import method_pages
import networks
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File

FOLDER = "source"
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def linked_files(docs: Path) -> list[Path]:
    """Every file of the repository that a page links to, also through such a file, by path."""
    pending = {path: path.read_text(encoding="utf-8") for path in docs.rglob("*.md")}
    generated = method_pages.methods_by_name() + networks.backbones()
    pending[docs / "reference" / "generated.md"] = generated
    found: set[Path] = set()
    while pending:
        page, text = pending.popitem()
        for target in _outside(text, page.parent, docs) - found:
            found.add(target)
            if target.suffix == ".md":
                pending[target] = target.read_text(encoding="utf-8")
    return sorted(found)


def page_of(path: Path, config: MkDocsConfig) -> File:
    """The page of one file: Markdown as it is, code with its highlighting."""
    docs = Path(config.docs_dir)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = _LINK.sub(lambda found: _from_root(found, path.parent, docs), text)
    else:
        name = path.relative_to(docs.parent).as_posix()
        language = _LANGUAGES.get(path.suffix, "text")
        text = f"---\nsearch: {{exclude: true}}\n---\n\n# `{name}`\n\n``````{language}\n{text}``````\n"
    return File.generated(config, _uri(path, docs), content=text)


def relinked(markdown: str, page: str, docs: Path) -> str:
    """The text of a page, its links to files outside of `docs` replaced by links to their pages."""
    folder = docs / os.path.dirname(page)

    def replaced(found: re.Match[str]) -> str:
        target = _resolved(found[1], folder, docs)
        if target is None:
            return found[0]
        return os.path.relpath(_uri(target, docs), os.path.dirname(page) or ".") + (found[2] or "")

    return _LINK.sub(replaced, markdown)


def _from_root(found: re.Match[str], folder: Path, docs: Path) -> str:
    """A link in a file of the repository, as its page in `source` writes it: pages of `docs` are one folder up."""
    target = (folder / found[1]).resolve()
    if target == docs.parent / "README.md":
        target = docs / "index.md"
    if target.is_relative_to(docs):
        return f"../{target.relative_to(docs).as_posix()}{found[2] or ''}"
    return os.path.relpath(target, docs / FOLDER) + (found[2] or "") if target.is_file() else found[0]


def _outside(text: str, folder: Path, docs: Path) -> set[Path]:
    targets = (_resolved(found[1], folder, docs) for found in _LINK.finditer(text))
    return {target for target in targets if target is not None}


def _resolved(link: str, folder: Path, docs: Path) -> Path | None:
    """The file outside of `docs` that a link means; None for every other link."""
    target = Path(os.path.normpath(folder / link))
    inside = target.is_relative_to(docs) or not target.is_relative_to(docs.parent)
    return target if not inside and target.is_file() and target != docs.parent / "README.md" else None


def _uri(path: Path, docs: Path) -> str:
    """`harness/method.py` -> `source/harness.method.py.md`: one folder, so that links between them are short."""
    name = path.relative_to(docs.parent).as_posix().replace("/", ".")
    return f"{FOLDER}/{name}" if path.suffix == ".md" else f"{FOLDER}/{name}.md"
