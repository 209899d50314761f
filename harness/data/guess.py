"""Guesses a `dataset.yaml` from the files of a folder: where they are, what masks hold, which images belong together.

Every guess is a line of the file with a comment that says what it rests on: a person confirms it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.data import guess_layout
from harness.data.base import Split
from harness.data.coco import Annotations
from harness.data.file_pairs import files_below
from harness.data.guess_layout import Pairing, PictureFile, lists, pairings, split_of, templated
from harness.data.guess_masks import MaskKind, guess_classes, kind_of, quoted, some_of
from harness.data.images import Bands, by_opencv, is_deep, read_image
from harness.data.layout import ANNOTATIONS, SPLIT, STEM
from harness.errors import UserError
from harness.util.text import counted, list_some

_FEW_GROUPS = 5
"""Fewer groups than this are only proposed in a comment."""
_SAYS_LABELS = re.compile(r"(?<![a-z])(1st|2nd|annot|ground.?truth|gt|label|manual)", re.IGNORECASE)
"""In the names of masks; those of a field of view (DRIVE, HRF) are called masks too."""


class Guess(NamedTuple):
    """A description, and what was found."""

    text: str
    """Of `dataset.yaml`."""
    summary: list[str]
    """One line each."""


class Lines:
    """The lines of a YAML file, each with a comment."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str, comment: str = "") -> None:
        """Add a line; the comment goes before it if both do not fit. Names in a comment cannot end the comment."""
        comment = _printable(comment)
        if comment and len(line) + len(comment) > 110:
            self.lines.append(f"# {comment}:")
            comment = ""
        self.lines.append(f"{line}  # {comment}" if comment else line)

    def note(self, comment: str) -> None:
        """Add a comment on a line of its own."""
        self.lines.append(f"# {_printable(comment)}")


def _printable(comment: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in comment)


def guess(root: Path, relative_root: str) -> Guess:
    """Describe the dataset below a folder; `relative_root` is the folder as it is written in the description.

    Raises `UserError` where no images with masks are found.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    files = guess_layout.pictures(root)
    lines = Lines()
    lines.add("# Guessed from the files of the folder. Confirm each line, then run `harness check`.")
    if relative_root != ".":
        lines.add(f"root: {quoted(relative_root)}")
    pairing, masks, reason = _images_and_masks(files)
    if pairing is None:
        annotated, damaged = _annotations(root, files)
        if annotated is None:
            reason = reason or list_some(damaged, 1)
            hint = "write `image` and `mask` patterns by hand; docs/datasets.md shows the usual layouts"
            problem = f"{root}: no images with masks among {counted(len(files), 'picture')}"
            raise UserError(f"{problem}{f': {reason}' if reason else ''}; {hint}")
        return _describe_annotations(lines, *annotated, damaged)
    image, mask = pairing.pattern(0), pairing.pattern(1)
    lines.add(f"image: {quoted(image)}", counted(len(pairing.pairs), "pair"))
    lines.add(f"mask: {quoted(mask)}", masks)
    unused = _left_out(lines, root, files, pairing)
    stems = [stem for stem, _, _ in pairing.pairs]
    _add_splits(lines, pairing.splits, SPLIT in image + mask, lists(root, frozenset(stems)))
    _add_group(lines, stems)
    _add_depth(lines, pairing.files(0))
    classes = guess_classes(root, [file.path for file in pairing.files(1)])
    lines.add("classes:", classes.comment)
    for entry in classes.entries:
        lines.add(f"  {entry}")
    summary = [
        f"{counted(len(pairing.pairs), 'pair')}: {image} with {mask}",
        *([masks] if masks else []),
        classes.summary,
        *unused,
    ]
    return Guess("\n".join(lines.lines) + "\n", summary)


def _left_out(lines: Lines, root: Path, files: Sequence[PictureFile], pairing: Pairing) -> list[str]:
    """Add notes on the pictures that are in no pair and on likely masks among them; returns their summary."""
    used = {file.path for which in (0, 1) for file in pairing.files(which)}
    unused = [file.path.relative_to(root).as_posix() for file in files if file.path not in used]
    if not unused:
        return []
    count, mask = counted(len(unused), "picture"), pairing.pattern(1)
    folders = Counter(path.rpartition("/")[0] or "." for path in unused)
    where = list_some([f"{folder}: {number}" for folder, number in sorted(folders.items())], 8)
    lines.note(f"{count} left out, in no pair of these patterns ({where})")
    lines.note("lists in `splits` can name pairs of several folders: docs/datasets.md")
    summary = [f"{count} in no pair: {list_some(unused)}"]
    labelled = [path for path in unused if _SAYS_LABELS.search(path)]
    if labelled and not _SAYS_LABELS.search(mask):
        summary.append(f"is {mask} a field of view, and are the labels in {list_some(labelled, 1)}?")
        lines.note(summary[-1])
    return summary


# ---- which files -----------------------------------------------------------------------------------------------------


def _images_and_masks(files: Sequence[PictureFile]) -> tuple[Pairing | None, str, str]:
    """The best pairing, images first, and other masks of the same images; else why no pairing is usable."""
    kinds: dict[tuple[Path, ...], MaskKind] = {}

    def kind(pairing: Pairing, which: int) -> MaskKind:
        some = tuple(some_of([file.path for file in pairing.files(which)], 3))
        if some not in kinds:
            kinds[some] = kind_of(some)
        return kinds[some]

    usable: list[tuple[tuple[bool, bool], int, bool, bool, int, Pairing]] = []
    reason = ""
    for pairing in pairings(files):
        if any(images < (True, False) and len(pairing.pairs) < -count for images, count, *_ in usable):
            break
        for ordered in (pairing, pairing.swapped()):
            images, masks = kind(ordered, 0), kind(ordered, 1)
            if not masks.reason and images.as_images < masks.as_images:
                unnamed = not _SAYS_LABELS.search(ordered.pattern(1))
                usable.append((images.as_images, -len(ordered.pairs), masks.colours, unnamed, masks.values, ordered))
            elif masks.reason and images.reason:
                pair = f"{ordered.pattern(0)} and {ordered.pattern(1)} pair"
                reason = reason or f"{pair}, but neither holds labels ({masks.reason})"
    if not usable:
        return None, "", reason
    usable.sort(key=lambda one: one[:5])
    best = usable[0][-1]
    pictures, used = ({file.path for file in best.files(which)} for which in (0, 1))
    others: list[str] = []
    for *_, one in usable:
        if pictures == {file.path for file in one.files(0)} and not used & {file.path for file in one.files(1)}:
            others.append(one.pattern(1))
            used |= {file.path for file in one.files(1)}
    return best, f"also: {list_some(others)}" if others else "", ""


def _annotations(
    root: Path, files: Sequence[PictureFile]
) -> tuple[tuple[str, str, Counter[str], list[str]] | None, list[str]]:
    """The patterns of images and of COCO files, the images of each split, and the categories that have objects.

    The list is what is wrong with files of that pattern, or with all files if no pattern is found.
    """
    found: dict[str, list[tuple[str | None, Annotations]]] = {}
    damaged: dict[str, list[str]] = {}
    for path in sorted(files_below(root)):
        if path.suffix.lower() != ANNOTATIONS:
            continue
        text, split = templated(path, root)
        try:
            annotations = Annotations(path)
        except UserError as error:
            below = path.relative_to(root).as_posix()
            damaged.setdefault(text, []).append(error.problem.replace(str(path), below, 1))
            continue
        found.setdefault(text, []).append((split, annotations))
    problems = [problem for several in damaged.values() for problem in several]
    if not found or not files:
        return None, problems
    mask, members = max(found.items(), key=lambda item: sum(len(one.images) for _, one in item[1]))
    names = {name.replace("\\", "/").rpartition("/")[2] for _, one in members for name in one.images}
    folders = Counter("/".join(file.folders) for file in files if file.path.name in names)
    if not folders:
        return None, problems
    image = "/".join(part for part in (folders.most_common(1)[0][0], STEM) if part)
    splits = Counter({split: len(one.images) for split, one in members if split is not None})
    used = list(dict.fromkeys(name for _, one in members for name in one.used_names()))
    if not used:
        raise UserError(f"{members[0][1].path}: no annotation has the `category_id` of one of its `categories`")
    return (image, mask, splits, used), damaged.get(mask, [])


def _describe_annotations(
    lines: Lines, image: str, mask: str, splits: Counter[str], names: Sequence[str], damaged: Sequence[str]
) -> Guess:
    for problem in damaged:
        lines.note(f"left out: {problem}")
    lines.add(f"image: {quoted(image)}")
    lines.add(f"mask: {quoted(mask)}", "COCO annotations; where objects overlap, the smaller one is on top")
    _add_splits(lines, splits, SPLIT in image + mask, {})
    lines.add("classes:", "the categories with objects, and what is outside of all objects")
    for name in dict.fromkeys(["background", *names]):
        lines.add(f"  - {quoted(name)}")
    lines.add("unlabelled: background", "or `ignore`, where not everything that is visible is annotated")
    found = f"COCO annotations of {counted(len(names), 'category', 'categories')}"
    return Guess(
        "\n".join(lines.lines) + "\n", [f"{image} with {mask}", found, *(f"left out: {one}" for one in damaged)]
    )


# ---- splits, groups, depth -------------------------------------------------------------------------------------------


def _add_splits(lines: Lines, names: Counter[str], named: bool, listed: dict[Split, str]) -> None:
    found: dict[Split, str] = dict(listed) if not named else {}
    for name, _ in names.most_common() if named else ():
        split = split_of(name)
        if split is not None:
            found.setdefault(split, name)
    counts = ", ".join(f"{name}: {count}" for name, count in sorted(names.items())) if named else ""
    if not found or found.keys() == {"train"}:
        parts = [f"{split}: {quoted(name)}" for split, name in found.items()] + ["test: 0.2"]
        lines.add(f"splits: {{{', '.join(parts)}}}", "no test split was found: a fifth is held out of train, by group")
        return
    comment = counts
    if "test" not in found:
        found["test"] = found.pop("dev")
        comment = f"{counts}{'; ' if counts else ''}test is the validation split, dev is held out of train"
    order: tuple[Split, ...] = ("train", "dev", "test")
    lines.add(
        f"splits: {{{', '.join(f'{split}: {quoted(found[split])}' for split in order if split in found)}}}", comment
    )
    if "train" not in found:
        lines.add("# No train split was found: name its folder in `splits`.")


_GROUPS = (
    (r"^(.+)/", "a folder each"),
    (r"^(.*?\d+)[_-]?(?:[lrLR]|left|right|OD|OS)(?![A-Za-z0-9])", "both sides of one"),
    (r"^(.+?)[_-](?:r|row|y)?\d+[_-](?:c|col|x)?\d+$", "tiles of one image"),
    (r"^(.*?)[_-]?\d+$", "frames of one clip"),
)


def _add_group(lines: Lines, stems: Sequence[str]) -> None:
    """A pattern that matches all names and puts two or more into most groups, as a line or a comment."""
    for pattern, meaning in _GROUPS:
        matches = [re.search(pattern, stem) for stem in stems]
        groups = Counter(match[1] for match in matches if match is not None)
        if sum(groups.values()) == len(stems) and 2 <= len(groups) <= len(stems) / 2 and "" not in groups:
            first = next(iter(groups))
            comment = f"{meaning}? {counted(len(groups), 'group')}, such as {first}"
            if len(groups) < _FEW_GROUPS:
                lines.add(f"# group: '{pattern}'", f"{comment}; use it if they resemble each other")
            else:
                lines.add(f"group: '{pattern}'", f"{comment}; remove it if the images of a group are unrelated")
            return
    lines.add(
        "# group: '^(.+)_'", "if images resemble each other (a patient, a clip, tiles), say which: docs/datasets.md"
    )


def _add_depth(lines: Lines, images: Sequence[PictureFile]) -> None:
    lowest, highest, count = np.inf, -np.inf, 0
    reason = ""
    for file in some_of(images, 20):
        content = file.path.read_bytes()
        try:
            read_image(content, Bands())
            deep = is_deep(content)
        except ValueError as error:  # with the remedy
            deep, reason = True, " ".join(str(error).split())
        except Exception:  # a damaged file, which `harness check` names
            continue
        values = _values(content) if deep else None
        if values is not None:
            lowest, highest, count = (
                min(lowest, *np.percentile(values, [1])),
                max(highest, *np.percentile(values, [99])),
                count + 1,
            )
    if count:
        numbers = [f"{value:.4g}" if highest < 10 else f"{value:.0f}" for value in (lowest, highest)]
        lines.add(
            f"range: [{', '.join(numbers)}]",
            f"more than 8 bits: 1 % and 99 % of the values of {counted(count, 'image')}",
        )
    elif reason:
        lines.add(f"# The first images are not read as they are: {reason}")


def _values(content: bytes) -> np.ndarray | None:
    try:
        pixels = by_opencv(content)
    except Exception:  # cv2.error, of a file that `harness check` names
        return None
    return pixels if pixels is not None and pixels.dtype != np.uint8 else None
