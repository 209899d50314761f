"""`harness new-dataset PATH`: writes a `dataset.yaml` that describes the files of a folder, for a person to confirm."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from harness.cli.folders import check_writable, writing
from harness.data.catalog import DESCRIPTION
from harness.errors import UserError
from harness.util.files import write_text


def new_dataset(folder: Path, out: Path | None, as_json: bool = False) -> None:
    """Write the description into the folder, or to `out`, and print what was found and what to do next.

    Raises `UserError` if the file exists, or if no images with masks are found.
    """
    from harness.data.guess import guess

    target = out or folder / DESCRIPTION
    if target.exists() or target.is_symlink():
        hint = "remove it, or write to another file with --out" if out is None else "choose another file"
        raise UserError(f"{target}: exists, and is not overwritten; {hint}")
    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {target}: name a file that ends in .yaml")
    check_writable("--out" if out else "new-dataset", target.parent)
    inside = folder.resolve().is_relative_to(target.parent.resolve())
    root = folder.resolve().relative_to(target.parent.resolve()) if inside else folder.resolve()
    found = guess(folder, root.as_posix())
    with writing(str(target)):
        write_text(target, found.text)
    if as_json:
        print(json.dumps({"written": [str(target)], "found": list(found.summary)}, indent=2))
        return
    print(target)
    for line in found.summary:
        print(f"  {line}")
    print("These are guesses: read the file, name the classes, and then run")
    dataset = target.parent if target.name == DESCRIPTION else target
    print(f"  harness check {shlex.quote(str(dataset))} --sheet sheet.png")
