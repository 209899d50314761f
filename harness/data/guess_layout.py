"""Guesses where a dataset's images and masks are, from the names of the files below a folder.

Files in folders of one kind whose names begin and end alike are a collection. Two collections pair where the rest of
their names is the same. The caller decides from the content which of the two are the images.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from harness.data.base import Split
from harness.data.file_pairs import files_below
from harness.data.layout import IMAGES, LIST, OTHER_MASKS, SPLIT, STEM, UNREAD

_WORDS: dict[Split, str] = {"train": "training|train", "dev": "validation|valid|val|dev", "test": "testing|test"}
_SPLIT_WORD = re.compile(
    rf"(?<![a-z])({'|'.join(_WORDS.values())})(\d{{4}})?(?=[^a-z]|$|annot|mask|label|image|img)", re.IGNORECASE
)
_PICTURES = IMAGES | OTHER_MASKS | (UNREAD - {".mat", ".img", ".hdr"})
_DEEPEST = 4
"""The most folders of a pattern before its `{stem}`."""
_LEAST_SHARE = 0.08
"""The least share of all pictures that makes a collection."""
_COVERAGE = 0.9
"""The least share of the smaller of two collections that must have a partner."""


@dataclass(frozen=True)
class PictureFile:
    """A picture by the parts of its path, in which the name of its split is `{split}`."""

    path: Path
    folders: tuple[str, ...]
    name: str
    """Without suffix."""
    split: str | None
    """The name of the split, as the path has it."""

    @property
    def suffix(self) -> str:
        """In lower case."""
        return self.path.suffix.lower()


@dataclass(frozen=True)
class Collection:
    """Files below folders of one kind, of one suffix or any, whose names begin with `head` and end with `tail`."""

    folders: tuple[str, ...]
    suffix: str
    head: str
    tail: str

    @property
    def pattern(self) -> str:
        """As in `dataset.yaml`."""
        return "/".join([*self.folders, f"{self.head}{STEM}{self.tail}{self.suffix}"])

    def stem(self, file: PictureFile) -> str:
        """What `{stem}` stands for in one of its files."""
        below = "/".join([*file.folders[len(self.folders) :], file.name.removeprefix(self.head)])
        return below.removesuffix(self.tail)


@dataclass(frozen=True)
class Pairing:
    """Two collections whose files pair by name."""

    collections: tuple[Collection, Collection]
    pairs: tuple[tuple[str, PictureFile, PictureFile], ...]
    """The stem, and a file of each collection."""

    def files(self, which: int) -> list[PictureFile]:
        """Those of the first collection (0) or of the second one (1) that are in a pair."""
        return [pair[which + 1] for pair in self.pairs]  # type: ignore[misc]

    def pattern(self, which: int) -> str:
        """As in `dataset.yaml`, with the suffix if all files in pairs have the same."""
        suffixes = {file.suffix for file in self.files(which)}
        pattern = self.collections[which].pattern
        return pattern + suffixes.pop() if len(suffixes) == 1 and not self.collections[which].suffix else pattern

    def swapped(self) -> Pairing:
        """With the collections in the other order."""
        return Pairing(self.collections[::-1], tuple((stem, second, first) for stem, first, second in self.pairs))

    @property
    def splits(self) -> Counter[str]:
        """The pairs of each name that stands for `{split}`; empty without such names."""
        names = (first.split or second.split for _, first, second in self.pairs)
        return Counter(name for name in names if name is not None)


def pictures(root: Path) -> list[PictureFile]:
    """The picture files below a folder, in the order of paths."""
    return [_parsed(path, root) for path in sorted(files_below(root)) if path.suffix.lower() in _PICTURES]


def pairings(files: Sequence[PictureFile]) -> list[Pairing]:
    """Every way to pair the files, sorted by the number of pairs, most first, then by the length of the patterns."""
    collections = _collections(files)
    ordered = sorted(collections, key=lambda one: one.pattern)
    found = []
    for index, first in enumerate(ordered):
        for second in ordered[index + 1 :]:
            if pairing := _pairing(first, collections[first], second, collections[second]):
                found.append(pairing)
    return sorted(found, key=lambda one: (-len(one.pairs), sum(len(c.pattern) for c in one.collections)))


def split_of(name: str) -> Split | None:
    """train, dev or test, of a name such as `training` or `val2017`."""
    match = _SPLIT_WORD.fullmatch(name)
    return next((split for split, words in _WORDS.items() if match and re.fullmatch(words, match[1], re.I)), None)


def templated(path: Path, root: Path) -> tuple[str, str | None]:
    """The path below the root with the name of its split as `{split}`, and that name; None where it has none or two.

    It is the name of a folder, or of the file where no folder has one.
    """
    below = PurePosixPath(path.relative_to(root).as_posix())
    in_folders, in_name = (
        {match[0] for match in _SPLIT_WORD.finditer(text)} for text in (str(below.parent), below.name)
    )
    names = in_folders or in_name
    if len(names) != 1:
        return below.as_posix(), None
    (name,) = names
    return _SPLIT_WORD.sub(lambda match: SPLIT if match[0] == name else match[0], below.as_posix()), name


def lists(root: Path, stems: frozenset[str]) -> dict[Split, str]:
    """The text files that list the stems of a split, from the folder that holds the most of them."""
    known = stems | {PurePosixPath(stem).name for stem in stems}
    found: dict[Path, dict[Split, str]] = {}
    for path in sorted(files_below(root)):
        split = split_of(path.stem) if path.suffix == LIST else None
        if split is not None and _lists_some(path, known):
            found.setdefault(path.parent, {})[split] = path.relative_to(root).as_posix()
    return max(found.values(), key=len, default={})


def _lists_some(path: Path, known: frozenset[str]) -> bool:
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        return False
    firsts = [PurePosixPath(line[0]) for line in lines]
    columns = {len(line) for line in lines}
    return bool(lines) and columns <= {1, 2} and all({first.name, first.stem} & known for first in firsts)


def _parsed(path: Path, root: Path) -> PictureFile:
    text, split = templated(path, root)
    below = PurePosixPath(text)
    if SPLIT not in below.parent.as_posix():  # such a word only in the file's name is not a split
        below, split = PurePosixPath(path.relative_to(root).as_posix()), None
    return PictureFile(path, below.parts[:-1], below.name.removesuffix(path.suffix), split)


def _collections(files: Sequence[PictureFile]) -> dict[Collection, dict[Path, PictureFile]]:
    groups: dict[Collection, dict[Path, PictureFile]] = {}
    for file in files:
        affixes = [("", ""), *((head, "") for head in _heads(file.name)), *(("", tail) for tail in _tails(file.name))]
        for depth in range(min(_DEEPEST, len(file.folders)) + 1):
            if any(SPLIT in folder for folder in file.folders[depth:]):
                continue
            of_folders = [("", f"/{file.name}")] if depth < len(file.folders) else []  # a folder for each image
            for suffix in ("", file.suffix):
                for head, tail in affixes + of_folders:
                    key = Collection(file.folders[:depth], suffix, head, tail)
                    groups.setdefault(key, {})[file.path] = file
    kept: dict[tuple[frozenset[Path], str, str], Collection] = {}
    for key, members in groups.items():
        least = 2 if key.head or key.tail else 1  # one name has no part in common with others
        if len(members) >= max(least, _LEAST_SHARE * len(files)):
            identity = frozenset(members), key.head, key.tail
            if identity not in kept or len(key.folders) > len(kept[identity].folders):
                kept[identity] = key
    return {key: groups[key] for key in kept.values()}


def _tails(name: str) -> Iterator[str]:
    """The last word of a name and the last two, with what separates them, if they have letters."""
    for expression in (r"[_. -][^_. -]+$", r"[_. -][^_. -]+[_. -][^_. -]+$"):
        match = re.search(expression, name)
        if match and match.start() > 0 and re.search("[A-Za-z]", match[0]):
            yield match[0]


def _heads(name: str) -> Iterator[str]:
    match = re.match(r"[A-Za-z]+[_. -]", name)
    if match and match.end() < len(name):
        yield match[0]


def _pairing(
    first: Collection, members: dict[Path, PictureFile], second: Collection, others: dict[Path, PictureFile]
) -> Pairing | None:
    """A file in both collections belongs to the one with the longer pattern, as in `layout.FoundFiles`."""
    shared = members.keys() & others.keys()
    if len(first.pattern) > len(second.pattern):
        others = {path: file for path, file in others.items() if path not in shared}
    else:
        members = {path: file for path, file in members.items() if path not in shared}
    if not members or not others:
        return None
    splits = [any(file.split for file in files.values()) for files in (members, others)]
    by_name = {(file.split if all(splits) else None, second.stem(file)): file for file in others.values()}
    pairs = []
    for file in members.values():
        stem = first.stem(file)
        other = by_name.get((file.split if all(splits) else None, stem))
        if other is not None:
            pairs.append((stem, file, other))
    if len(pairs) < _COVERAGE * min(len(members), len(others)):
        return None
    return Pairing((first, second), tuple(pairs))
