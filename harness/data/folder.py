r"""A user's own dataset: images and masks, described by a small YAML file.

`image` and `mask` are patterns of their paths (see `layout`), by default

    images/{split}/{stem}     .jpg, .jpeg, .png, .tif, .tiff, .bmp, .webp
    masks/{split}/{stem}      .png, .tif, .tiff, else .gif, .bmp, .ppm, .npy; class indices, or stated colours

`splits: {train, dev, test}` says what replaces `{split}`; or a text file lists the images of a split, one per line; or
`test` is a fraction, which is held out of train. Where there is no dev split, a part of train is held out as dev. Both
are held out by `group`, so that images that resemble each other stay in one split. `group` is a regular expression on
an image's name, which is its `{stem}`; what the parentheses match is the group:

    clip1_000240.jpg      '^(.+)_\d+$'         clip1: the frames of a video
    clip1/000240.jpg      '^(.+)/'             clip1: a folder for each
    patient_03_L.png      '^(patient_\d+)_'    patient_03: both eyes of a patient
    scene12_r3_c4.png     '^(scene\d+)_'       scene12: the tiles of an image
    0016E5_07959.jpg      '^(\w+)\d{3}$'      0016E5_07: a thousand frames of a long video, to have more groups
"""

from __future__ import annotations

import colorsys
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from harness.data.base import IGNORE_INDEX, Bands, Sample, Split
from harness.data.coco import Annotations
from harness.data.description import read_description
from harness.data.file_pairs import Files, PairedFiles
from harness.data.layout import LIST, SPLIT, FileLayout, FoundFiles, two_paths
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
        self.states_values = fields.is_annotated or fields.codes is not None
        self.states_255 = fields.is_annotated or IGNORE_INDEX in (*fields.ignore, *(fields.codes or ()))
        self._fields = fields
        self._layout = FileLayout(self.root, fields.image, fields.mask)
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

    @cached_property
    def _found(self) -> dict[str, FoundFiles]:
        """The files of each name in `splits`."""
        names = (name for name in self._names.values() if isinstance(name, str))
        return {name: FoundFiles(*self._layout.patterns(name)) for name in names}

    def _find(self, split: Split, name: str) -> dict[str, Files]:
        found = self._found[name]
        if found.problems:
            self.refuse(found.problems)
        pairs = self._annotated(found) if found.mask.is_annotations else found.pairs
        if name.endswith(LIST):
            return self._listed(self.root / name, found, pairs)
        for folder in (found.image.folder, found.mask.folder):
            if not os.path.isdir(folder):  # unlike `Path.is_dir`, False for a name that the system refuses
                hint = "`image`, `mask` and `splits` say where files are (`harness new-dataset` guesses them)"
                hint += "; `splits: {test: 0.2}` holds out a fifth" if split == "test" else ""
                self.refuse([f"{folder}: no such folder; the {split} split is not there"], hint)
        of_image, of_mask = (self._layout.decides(text, name) for text in (self._fields.image, self._fields.mask))
        if found.unread_images and of_image:
            hint = f"images are {found.image.shown_formats}: convert it, or move it out of the folder"
            self.refuse([f"{path}: {path.suffix} is not read" for path in found.unread_images], hint)
        if not found.images:
            self.refuse([f"{found.image.folder}: no images ({found.image.shown_formats}); the {split} split is empty"])
        lonely = [found.no_mask(stem) for stem in found.images if of_image and stem not in pairs]
        lonely += [found.no_image(stem) for stem in found.masks if of_mask and stem not in pairs]
        if lonely:
            self.refuse(lonely)
        if not pairs:
            self.refuse([f"{found.image.folder}: no image has a mask; the {split} split is empty"])
        return pairs

    def _listed(self, path: Path, found: FoundFiles, pairs: dict[str, Files]) -> dict[str, Files]:
        """The pairs of a list: a line is an image's stem or path, or the paths of an image and its mask."""
        stem_of = found.stem_of_path()
        listed: dict[str, Files] = {}
        images: set[Path] = set()
        problems: list[str] = []
        for number, line in enumerate(self._lines(path), 1):
            stem = line if line in found.images else stem_of.get(line)
            files = two_paths(line, self.root) if stem is None else pairs.get(stem)
            if files is None:
                missing = f"no image {found.image.path(line, '.*')}" if stem is None else found.no_mask(stem)
                problems += [f"{path}: line {number}: {missing}"] if line else []
                continue
            stem = stem or Path(self._relative(files.image)).with_suffix("").as_posix()
            if files.image in images:
                problems.append(f"{path}: line {number}: {line} is listed twice")
            images.add(files.image)
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
        except UnicodeDecodeError:
            self.refuse([f"{path}: not a text file in UTF-8"])
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self.refuse([f"{path}: {reason}"], "`splits` names lists of images below `root`")

    def _annotated(self, found: FoundFiles) -> dict[str, Files]:
        """The images that a COCO file names, with their objects."""
        fields, path = self._fields, found.mask.path("")
        with located(self.description):
            annotations = Annotations(path)
            labels = annotations.labels(self.classes, fields.codes, fields.ignore)
        rest = self.classes.index(fields.unlabelled) if fields.unlabelled in self.classes else IGNORE_INDEX
        names = Counter(image.name for image in found.images.values())
        stem_of = {image.name: stem for stem, image in found.images.items() if names[image.name] == 1}
        stem_of |= found.stem_of_path()
        pairs: dict[str, Files] = {}
        missing = []
        for name in annotations.file_names():
            below = name.replace("\\", "/").removeprefix("./")
            stem = stem_of.get(below) or stem_of.get(below.rpartition("/")[2])
            if stem is None:
                missing.append(f"{path}: no image {name} below {found.image.folder}")
            elif stem in pairs:
                self.refuse([f"{path}: names {found.images[stem]} twice"])
            else:
                pairs[stem] = Files(found.images[stem], path, annotations.mask(name, labels, rest))
        if missing and SPLIT in fields.mask:
            self.refuse(missing)
        return pairs

    def _unused_pictures(self) -> Iterator[str]:
        """Pictures beside the images that are in no split; not for lists, which say themselves which ones are."""
        used = {path for pairs in self._pairs.values() for files in pairs.values() for path in files[:2]}
        found = [files for name, files in self._found.items() if not name.endswith(LIST)]
        unused = {path for files in found for path in files.pictures()} - used
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
            hint = "a name is what `{stem}` matches: by default the path below the split's folder, without suffix"
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
