"""A cache entry counts only as it was written, for the key it was written for."""

from __future__ import annotations

import json
from pathlib import Path

from harness.util.json_cache import cached_json, read_cached_json


def test_changed_or_moved_entry_is_recomputed(tmp_path: Path) -> None:
    for key in ("a", "b"):
        cached_json(tmp_path, "step", {"key": key}, lambda key=key: {"flops": ord(key)})
    assert read_cached_json(tmp_path, "step", {"key": "a"}) == {"flops": 97}
    first, second = (path for path in tmp_path.iterdir())
    content = json.loads(first.read_text())
    first.write_text(json.dumps(content | {"value": {"flops": 1}}))
    own, other = content["key"], json.loads(second.read_text())["key"]
    assert read_cached_json(tmp_path, "step", own) is None
    first.write_bytes(second.read_bytes())
    assert read_cached_json(tmp_path, "step", own) is None
    assert cached_json(tmp_path, "step", own, lambda: {"flops": 2}) == {"flops": 2}
    assert read_cached_json(tmp_path, "step", other) is not None
