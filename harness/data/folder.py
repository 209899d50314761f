r"""A user's own dataset: images and masks, described by a small YAML file.

`image` and `mask` are patterns of their paths (see `layout`), by default

    images/{split}/{stem}     .jpg, .jpeg, .png, .tif, .tiff, .bmp, .webp
    masks/{split}/{stem}      .png, .tif, .tiff, else .gif, .bmp, .ppm, .npy; class indices, or stated colours

`splits: {train, dev, test}` says what fills in `{split}`; or a text file lists the images of a split, one a line; or
`test` is a fraction, which is held out of train. Where there is no dev split, a part of train is held out as dev. Both
by `group`, so that images that resemble each other are not divided. `group` is a regular expression on an image's name,
which is its `{stem}`; what the parentheses match is the group:

    clip1_000240.jpg      '^(.+)_\d+$'         clip1: the frames of a video
    clip1/000240.jpg      '^(.+)/'             clip1: a folder for each
    patient_03_L.png      '^(patient_\d+)_'    patient_03: both eyes of a patient
    scene12_r3_c4.png     '^(scene\d+)_'       scene12: the tiles of an image
    0016E5_07959.jpg      '^(\w+)\d{3}$'      0016E5_07: a thousand frames of a long video, to have more groups
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from harness.data.base import IGNORE_INDEX, Sample, Split
from harness.data.coco import Annotations
from harness.data.description import read_description
from harness.data.file_pairs import Files, PairedFiles
from harness.data.images import Bands
from harness.data.layout import LIST, SPLIT, Layout, Pattern, Stems, two_paths
from harness.data.splits import held_out_groups
from harness.errors import UserError, located
from harness.util.text import counted


class FolderDataset(PairedFiles):
    """The dataset that a YAML file describes. Raises `UserError` for an invalid file."""

    def __init__(self, description: Path, cache: Path) -> None:
        fields = read_description(description)
        default = description.parent.resolve().name if description.stem == "dataset" else description.stem
        self.name = fields.name or default
        self.description = description
        self.root = description.parent / fields.root
        self.cache = cache
        self.classes = fields.classes
        self.palette = fields.palette or distinct_colours(len(fields.classes))
        self.scale = fields.scale
        self.rules = fields.label_rules()
        self.bands = Bands(fields.range, fields.bands)
        self.states_255 = IGNORE_INDEX in (*fields.ignore, *(fields.codes or ()))
        self._fields = fields
        self._layout = Layout(self.root, fields.image, fields.mask)
        with located(description):
            self._names = fields.splits.named(self._layout.has)
            self._layout.check(self._names)

    @property
    def test_is_held_out(self) -> bool:
        """See the base class."""
        return isinstance(self._names["test"], float)

    @property
    def oddities(self) -> Sequence[str]:
        return [*super().oddities, *self._unused_pictures()]

    def find(self, split: Split) -> list[Sample]:
        name = self._names.get(split)
        if name is None:
            return []
        held_out = isinstance(self._names["test"], float) and split != "dev"
        pairs = self._pairs["train" if held_out else split]
        groups = self._groups(split, list(pairs))
        if held_out:
            held = self._held_out(groups)
            groups = {stem: group for stem, group in groups.items() if (group in held) == (split == "test")}
        grouped = self._fields.group is not None
        return [
            Sample(f"{split}/{stem}", group if grouped else f"{split}/{stem}", pairs[stem])
            for stem, group in groups.items()
        ]

    @cached_property
    def _pairs(self) -> dict[Split, dict[str, Files]]:
        """The pairs of each named split, by stem."""
        return {split: self._find(split, name) for split, name in self._names.items() if isinstance(name, str)}

    def _find(self, split: Split, name: str) -> dict[str, Files]:
        image, mask = self._layout.patterns(name)
        listed = name.endswith(LIST)
        for folder in dict.fromkeys([image.folder, mask.folder]):
            if not listed and not folder.is_dir():
                hint = "`image`, `mask` and `splits` say where files are (`harness new-dataset` finds out)"
                hint += "; `splits: {test: 0.2}` holds out a fifth" if split == "test" else ""
                self.refuse([f"{folder}: no such folder; the {split} split is not there"], hint)
        found = Stems(image, mask)
        if found.problems:
            self.refuse(found.problems)
        pairs = {stem: Files(path, found.masks[stem]) for stem, path in found.images.items() if stem in found.masks}
        if mask.is_annotations:
            pairs = self._annotated(image, found.images, mask)
        if listed:
            return self._listed(self.root / name, image, mask, found, pairs)
        decides = self._layout.decides
        if found.unread_images and decides(self._fields.image, name):
            hint = f"images are {image.shown_formats}: convert it, or move it out of the folder"
            self.refuse([f"{path}: {path.suffix} is not read" for path in found.unread_images], hint)
        if not found.images:
            self.refuse([f"{image.folder}: no images ({image.shown_formats}); the {split} split is empty"])
        lonely: list[str] = []
        if decides(self._fields.image, name):
            lonely += [
                self._no_mask(stem, path, mask, found) for stem, path in found.images.items() if stem not in pairs
            ]
        if decides(self._fields.mask, name):
            lonely += [
                f"{path}: no image {image.path(stem, '.*')}" for stem, path in found.masks.items() if stem not in pairs
            ]
        if lonely:
            self.refuse(lonely)
        if not pairs:
            self.refuse([f"{image.folder}: no image has a mask; the {split} split is empty"])
        return pairs

    def _no_mask(self, stem: str, image: Path, mask: Pattern, found: Stems) -> str:
        if mask.is_annotations:
            return f"{image}: is not among the images of {mask.path('')}"
        if stem in found.unread_masks:
            unread = found.unread_masks[stem]
            return f"{image}: its mask {unread} is a {unread.suffix}, which is not read; save it as a PNG"
        more = "" if mask.suffix else f" (or another of {mask.shown_formats})"
        return f"{image}: no mask {mask.path(stem, '.png')}{more}"

    def _listed(
        self, path: Path, image: Pattern, mask: Pattern, found: Stems, pairs: dict[str, Files]
    ) -> dict[str, Files]:
        """The pairs of a list: a line is an image's stem or path, or the paths of an image and its mask."""
        by_path = {
            below: stem for stem, file in found.images.items() for below in _names_of(file, image.folder, self.root)
        }
        listed: dict[str, Files] = {}
        problems: list[str] = []
        for number, line in enumerate(self._lines(path), 1):
            if not line:
                continue
            stem = line if line in found.images else by_path.get(line)
            files = pairs.get(stem) if stem is not None else two_paths(line, self.root)
            if files is None:
                problem = (
                    self._no_mask(stem, found.images[stem], mask, found)
                    if stem
                    else f"no image {image.path(line, '.*')}"
                )
                problems.append(f"{path}: line {number}: {problem}")
                continue
            stem = stem or Path(self._relative(files.image)).with_suffix("").as_posix()
            if stem in listed:
                problems.append(f"{path}: line {number}: {line} is listed twice")
            listed[stem] = files
        if problems:
            hint = "a line is an image's `{stem}`, or the paths of image and mask below `root` with a tab between them"
            self.refuse(problems, hint)
        if not listed:
            self.refuse([f"{path}: lists no images"])
        return listed

    def _lines(self, path: Path) -> list[str]:
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except OSError as error:
            self.refuse([f"{path}: {error.strerror}"], "`splits` names lists of images below `root`")
        except UnicodeDecodeError:
            self.refuse([f"{path}: not a text file in UTF-8"])

    def _annotated(self, image: Pattern, images: dict[str, Path], mask: Pattern) -> dict[str, Files]:
        """The images that a COCO file names, with their objects."""
        fields, path = self._fields, mask.path("")
        with located(self.description):
            annotations = Annotations(path)
            labels = annotations.labels(self.classes, fields.codes, fields.ignore)
        rest = self.classes.index(fields.unlabelled) if fields.unlabelled in self.classes else IGNORE_INDEX
        names = Counter(file.name for file in images.values())
        by_path = {file.name: stem for stem, file in images.items() if names[file.name] == 1}
        by_path |= {below: stem for stem, file in images.items() for below in _names_of(file, image.folder, self.root)}
        pairs: dict[str, Files] = {}
        missing = []
        for name in annotations.file_names():
            below = name.replace("\\", "/").removeprefix("./")
            stem = by_path.get(below) or by_path.get(below.rpartition("/")[2])
            if stem is None:
                missing.append(f"{path}: no image {name} below {image.folder}")
            else:
                pairs[stem] = Files(images[stem], path, annotations.mask(name, labels, rest))
        if missing and SPLIT in self._fields.mask:
            self.refuse(missing)
        return pairs

    def _unused_pictures(self) -> Iterator[str]:
        """Pictures beside the images that are in no split. Where a list names the images, it says which ones are."""
        used = {path for pairs in self._pairs.values() for files in pairs.values() for path in files[:2]}
        unused: set[Path] = set()
        for name in self._names.values():
            if isinstance(name, str) and not name.endswith(LIST):
                found = Stems(*self._layout.patterns(name))
                unused |= {*found.unused, *found.images.values(), *found.unread_images} - used
        if unused:
            first = self._relative(min(unused))
            yield f"{counted(len(unused), 'picture')} ({first} first) not used: no pair of `image` and `mask`"

    def _groups(self, split: Split, stems: list[str]) -> dict[str, str]:
        """The group of each name. Raises `UserError` unless the pattern matches all."""
        pattern = self._fields.group
        if pattern is None:
            return {stem: stem for stem in stems}
        matches = {stem: pattern.search(stem) for stem in stems}
        groups = {stem: match[1] for stem, match in matches.items() if match is not None and match[1] is not None}
        if len(groups) < len(stems):
            example = next(stem for stem in stems if stem not in groups)
            count, so = (f"only {len(groups)}", "and not") if groups else ("none", "such as")
            problem = f"matches {count} of the {len(stems)} names of the {split} split, {so} {example!r}"
            hint = "a name is what `{stem}` stands for: by default the path below the split's folder, without suffix"
            raise UserError(problem, field="group", value=pattern.pattern, hint=hint).at(self.description)
        return groups

    def _held_out(self, groups: Mapping[str, str]) -> set[str]:
        """The groups of the test split, where it is a fraction."""
        sizes = Counter(groups.values())
        if len(sizes) < 2:
            problem = f"test cannot be held out of train, which is one group ({next(iter(sizes))})"
            hint = "write a `group` pattern of smaller groups"
            raise UserError(problem, field="splits.test", value=self._names["test"], hint=hint).at(self.description)
        fraction = self._names["test"]
        assert isinstance(fraction, float)
        return held_out_groups(sizes, fraction)


def _names_of(path: Path, *folders: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for folder in folders)


def distinct_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` different colours, always the same.

    The first eight are Okabe and Ito's, which colour-blind people can distinguish; then steps of the golden angle in
    hue over four levels of lightness, so that neighbours differ in more than hue.
    """
    colours = [
        *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)),
        *((86, 180, 233), (213, 94, 0), (240, 228, 66), (64, 64, 64)),
    ]
    step = 0
    while len(colours) < count:
        hue, lightness = step * 0.381966 % 1, (0.3, 0.7, 0.45, 0.85)[step % 4]
        red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 0.6))
        if (red, green, blue) not in colours:
            colours.append((red, green, blue))
        step += 1
    return tuple(colours[:count])
