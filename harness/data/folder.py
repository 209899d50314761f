r"""A user's own dataset: a folder of images and masks, described by a small YAML file.

images/<split>/**.jpg|.jpeg|.png|.tif|.tiff|.bmp|.webp
masks/<split>/**.png|.tif|.tiff|.gif|.bmp|.ppm|.npy        same relative name; class indices, or stated colours

`splits: {train, dev, test}` names the folders. Where there is no dev split, a part of train is held out as dev, by
`group`, so that images that resemble each other are not divided. `group` is a regular expression on an image's name,
which is its path below the split's folder without the suffix; what the parentheses match is the group:

    clip1_000240.jpg      '^(.+)_\d+$'         clip1: the frames of a video
    clip1/000240.jpg      '^(.+)/'             clip1: a folder for each
    patient_03_L.png      '^(patient_\d+)_'    patient_03: both eyes of a patient
    scene12_r3_c4.png     '^(scene\d+)_'       scene12: the tiles of an image
    0016E5_07959.jpg      '^(\w+)\d{3}$'      0016E5_07: a thousand frames of a long video, to have more groups
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from pathlib import Path

from harness.data.base import IGNORE_INDEX, Bands, Sample, Split
from harness.data.description import read_description
from harness.data.file_pairs import Files, PairedFiles, files_below
from harness.errors import UserError, located

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"})
MASKS = frozenset({".png", ".tif", ".tiff"})
OTHER_MASKS = frozenset({".gif", ".bmp", ".ppm", ".pgm", ".npy"})
"""Read where an image has none of the others: masks folders hold previews in these formats too."""
UNREAD = frozenset(
    {".ppm", ".pgm", ".pnm", ".gif", ".jfif", ".jpe", ".jp2", ".j2k", ".heic", ".heif", ".avif", ".tga", ".psd", ".pcx"}
    | {".npy", ".exr", ".hdr", ".dng", ".nef", ".cr2", ".dcm", ".nii", ".mat", ".img", ".svs"}
)
"""Formats of images that are not read: such a file is an error, not left out in silence."""


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
        self._group = fields.group
        with located(description):
            self._folders = fields.splits.folders(self.root / "images")

    def find(self, split: Split) -> list[Sample]:
        if split not in self._folders:
            return []
        images, masks = (self.root / kind / self._folders[split] for kind in ("images", "masks"))
        for folder in (images, masks):
            if not folder.is_dir():
                self.refuse([f"{folder}: no such folder; `splits` and `root` say where the {split} split is"])
        image_files, mask_files = sorted(files_below(images)), sorted(files_below(masks))
        image_of, mask_of = self._by_stem(images, image_files, IMAGES), self._by_stem(masks, mask_files, MASKS)
        others = self._by_stem(masks, mask_files, OTHER_MASKS)
        mask_of |= {stem: others[stem] for stem in image_of if stem in others and stem not in mask_of}
        self._refuse_unread(images, image_files, image_of)
        unread = {path.relative_to(masks).with_suffix("").as_posix(): path for path in mask_files}
        formats = ", ".join(sorted(MASKS | OTHER_MASKS))
        lonely = [
            f"{path}: its mask {unread[stem]} is a {unread[stem].suffix}, which is not read; save it as a PNG"
            if stem in unread
            else f"{path}: no mask {masks / stem}.png (or another of {formats})"
            for stem, path in image_of.items()
            if stem not in mask_of
        ]
        lonely += [f"{mask_of[stem]}: no image {images / stem}.*" for stem in mask_of if stem not in image_of]
        if lonely:
            self.refuse(lonely)
        if not image_of:
            self.refuse([f"{images}: no images ({', '.join(sorted(IMAGES))}); the {split} split is empty"])
        groups = self._groups(split, list(image_of))
        return [
            Sample(f"{split}/{stem}", group, Files(image, mask_of[stem]))
            for (stem, image), group in zip(image_of.items(), groups, strict=True)
        ]

    def _by_stem(self, folder: Path, files: Iterable[Path], suffixes: frozenset[str]) -> dict[str, Path]:
        found: dict[str, Path] = {}
        twice = []
        for path in files:
            if path.suffix.lower() not in suffixes:
                continue
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                twice.append(f"{path}: {found[stem].name} has the same name; remove one")
            found[stem] = path
        if twice:
            self.refuse(twice)
        return found

    def _refuse_unread(self, images: Path, files: Iterable[Path], image_of: dict[str, Path]) -> None:
        unread = [path for path in files if path.suffix.lower() in UNREAD]
        unread = [path for path in unread if path.relative_to(images).with_suffix("").as_posix() not in image_of]
        if unread:
            formats = ", ".join(sorted(IMAGES))
            hint = f"images are {formats}: convert it, or move it out of the folder"
            self.refuse([f"{path}: {path.suffix} is not read" for path in unread], hint)

    def _groups(self, split: Split, stems: list[str]) -> list[str]:
        """The group of each name. Raises `UserError` unless the pattern matches all."""
        if self._group is None:
            return [f"{split}/{stem}" for stem in stems]
        matches = [self._group.search(stem) for stem in stems]
        groups = [match[1] for match in matches if match is not None and match[1] is not None]
        if len(groups) < len(stems):
            example = next(s for s, match in zip(stems, matches, strict=True) if match is None or match[1] is None)
            count, so = (f"only {len(groups)}", "and not") if groups else ("none", "such as")
            problem = f"matches {count} of the {len(stems)} names of the {split} split, {so} {example!r}"
            hint = "a name is the path below the split's folder, without suffix"
            raise UserError(problem, field="group", value=self._group.pattern, hint=hint).at(self.description)
        return groups


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
