"""Whether a change of the code changes a fingerprint or a bit of a result.

    python tests/bits.py record FILE.json [--work DIR] [--python PYTHON]   # execute tiny runs, write their results
    python tests/bits.py check FILE.json [--work DIR] [--python PYTHON]    # again; print what differs, exit code 1

It drives `PYTHON -m harness`, reads what that leaves, and imports nothing of the project: what one commit left can be
compared with any other. `--only 'plan-*'` executes a part of them. Times, hosts, dates and the code's
provenance are left out. The last bits depend on the processor and the packages too, which FILE.json names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# ---- what is executed: all that follows the command line -------------------------------------------------------------

HARNESS = "-m harness"
TWO_PROCESSES = "-m torch.distributed.run --standalone --nproc-per-node 2 -m harness"
CHANCE = "--device cpu --workers 0 --tracking off"
COMPARE = f"{CHANCE} --json"
CELL = f"--backbone resnet10t --weights random --dataset ./colours --head fpn:16 {CHANCE}"
PLAN = "--plan --json"
UNTUNED = f"{PLAN} --trials 0"  # the fingerprints of tuned cells are known when their searches have ended
CAMVID = ("lite0", "lite0_ablation", "vit")
TWO_CORES = {
    # Every method on a CNN and a Transformer: each cell alone, then side by side and on kept features.
    "grid": f"compare grid-study.yaml --jobs 2 --together 1 --cache-size 0 {COMPARE}",
    "grid-together": f"compare grid-study.yaml --jobs 2 --together 4 --cache-size 1GB {COMPARE}",
    "families": f"compare families-study.yaml --jobs 2 --together 3 --cache-size 0 {COMPARE}",
    "tuned": f"compare tuned-study.yaml --jobs 2 {COMPARE}",
    "processes": f"run --method spm --budget plain.yaml {CELL}",
}
ONE_CORE = {
    # Three cells with nothing kept, and each on what those before it kept.
    "kept-none": f"compare kept-study.yaml --jobs 1 --cache-size 0 {COMPARE}",
    "kept": f"compare kept-study.yaml --jobs 1 --cache-size 1GB {COMPARE}",
    "whole": f"run --method spm --budget longer.yaml {CELL}",
    "resumed": f"run --method spm --budget longer.yaml --checkpoint-seconds 0 {CELL}",
    "search": f"search --method lora --budget plain.yaml --trials 4 --jobs 1 {CELL}",
    "front": "search --method spm --budget plain.yaml --trials 3 --jobs 1 --sampler random --parameters lr,hidden "
    f"--space hidden=4:16 --set iterations=1 --objective miou --objective trained {CELL}",
    "slide": f"run --method lora --budget slide.yaml {CELL}",
    "accumulate": f"run --method spm --budget accumulate.yaml {CELL}",
    "bf16": f"run --method spm --budget bf16.yaml {CELL}",
    "bf16-vit": f"run --method vpt_deep --budget bf16.yaml {CELL} --backbone test_vit",
    "channels-last": f"run --method conv_adapter --budget channels_last.yaml {CELL}",
    "no-clip": f"run --method full --set statistics=frozen --budget no_clip.yaml {CELL}",
    "dev": f"run --method linear --part dev --seed 3 --budget plain.yaml {CELL}",
    "uper": f"run --method spm --set relative=false --set gaps=2,3 --budget plain.yaml {CELL} --head uper:16",
    "plan-landcover-tuned": f"compare landcover {PLAN}",
    **{f"plan-{name}": f"compare {name} {UNTUNED}" for name in ("demo", "landcover", "tradeoff", "spm_ablation")},
    **{  # studies of data that are not here, with the tiny data in their place
        f"plan-{name}": f"compare {name} {UNTUNED} --dataset ./colours"
        for name in ("paper", *(f"camvid_{kind}" for kind in CAMVID))
    },
}
KILLED = {"resumed": 10}  # when it has a checkpoint of that step; then started again
EQUAL = {"grid-together": "grid", "kept": "kept-none", "resumed": "whole"}  # compared with those, not recorded
REUSED = {"grid-together": "evaluation", "kept": "training"}  # where kept features must be used, or it proves nothing
# fmt: off
STUDIES: dict[str, dict[str, Any]] = {
    "grid": {
        "methods": [
            "adapter", "adaptformer", "bias", "conv_adapter", "convpass", "dora", "fact", "full", "hra", "ia3",
            "linear", "loha", "lokr", "lora", "lorand", "mona", "norm", "oft", "partial", "rein", "repadapter", "side",
            "spm", "ssf", "vpt_deep", "vpt_pad", "vpt_shallow",
        ],
        "backbones": ["resnet10t", "test_vit"],
    },
    "families": {
        "methods": ["adapter", "lora", "spm"],
        "backbones": [
            "test_convnext", "test_efficientnet", "mobilenetv3_small_050", "pvt_v2_b0", "regnety_002", "resnest14d",
            "res2net50_14w_8s", "skresnet18", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "caformer_s18",
            "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224",
        ],
        "budget": "short.yaml",
    },
    "kept": {"methods": ["linear", "partial", "spm"], "backbones": ["resnet10t"], "budget": "kept.yaml"},
    "tuned": {
        "methods": ["linear", {"method": "bias", "label": "biases", "settings": {"weight_decay": 0.0}}],
        "backbones": ["test_vit"],
        "seeds": 2,
        "tune": {"trials": 2, "parameters": ["head_lr"], "space": {"head_lr": "0.001|0.003"}, "sampler": "grid"},
    },
}
BUDGETS: dict[str, dict[str, Any]] = {
    "plain": {}, "short": {"steps": 2, "warmup": 0}, "longer": {"steps": 40},
    "kept": {"steps": 20},  # features are kept in files of 16 passes
    "slide": {"evaluation": "slide", "stride": [20, 24]}, "accumulate": {"accumulate": 2},
    "bf16": {"precision": "bf16"}, "channels_last": {"channels_last": True}, "no_clip": {"clip_norm": 0},
}
# fmt: on


def make_inputs(work: Path) -> None:
    """Images of three noisy bands of colour with an ignored margin; budgets; studies."""
    draw = np.random.default_rng(0)
    colours = np.array([(200, 40, 40), (40, 180, 60), (30, 60, 200)])
    for split, count in (("train", 8), ("test", 5)):
        for number in range(count):
            bounds = np.sort(draw.integers(8, 56, 2))
            mask = np.repeat(draw.permutation(3)[np.searchsorted(bounds, np.arange(64))][None].astype(np.uint8), 64, 0)
            image = (colours[mask] + draw.normal(0, 20, (64, 64, 3))).clip(0, 255).astype(np.uint8)
            mask[:4] = 255
            for kind, pixels in (("images", image), ("masks", mask)):
                path = work / "colours" / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(pixels))
    (work / "colours" / "dataset.yaml").write_text(yaml.safe_dump({"classes": ["brick", "grass", "water"]}))
    for name, fields in BUDGETS.items():
        budget = {"steps": 6, "batch_size": 4, "crop": [32, 32], "warmup": 1, **fields}
        (work / f"{name}.yaml").write_text(yaml.safe_dump(budget))
    for name, fields in STUDIES.items():
        study = {"datasets": ["./colours"], "heads": ["fpn:16"], "budget": "plain.yaml", **fields}
        study["backbones"] = [{"backbone": backbone, "weights": "random"} for backbone in fields["backbones"]]
        (work / f"{name}-study.yaml").write_text(yaml.safe_dump(study))


def png(pixels: np.ndarray) -> bytes:
    """[H, W] or [H, W, 3], not compressed: the same bytes whatever library there is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2 * (pixels.ndim - 2), 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels), 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def execute(name: str, line: str, work: Path, python: str) -> dict[str, Any]:
    """The results of one command: its exit code, the cells that it printed, its runs, its searches."""
    began = time.monotonic()
    runs = work / "runs" / ("plans" if name.startswith("plan-") else name)  # plans share what is looked up for them
    begin = TWO_PROCESSES if name == "processes" else HARNESS
    command = [python, *begin.split(), *line.split(), "--runs", str(runs)]
    foreign = ("HARNESS_", "MLFLOW_", "RANK", "WORLD_SIZE", "LOCAL_", "PYTHONPATH")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    # In `work`, and not in a checkout, whose packages would be found before those of PYTHON's environment.
    options: dict[str, Any] = {"env": variables, "cwd": work, "text": True}
    if name in KILLED:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        while process.poll() is None and checkpoint(runs) < KILLED[name]:
            time.sleep(0.005)
        process.kill()
        process.wait()
        if checkpoint(runs) < 0 or any(map(read_result, run_folders(runs))):
            raise SystemExit(f"{name}: not killed in its middle")
    done = subprocess.run(command, capture_output=True, timeout=1800, **options)
    ended = f"exit code {done.returncode}: {' | '.join(done.stderr.splitlines()[-3:])}, " if done.returncode else ""
    print(f"{name}: {ended}{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if name in REUSED and not any(read_result(run).get("reuse", {}).get(REUSED[name]) for run in run_folders(runs)):
        raise SystemExit(f"{name}: no kept features were used")
    left = {
        "exit code": done.returncode,
        "cells": json.loads(done.stdout) if "--json" in command and done.stdout else None,
        "runs": {name_of(run): read_run(run) for run in run_folders(runs)},
        "searches": {folder.name: read_search(folder) for folder in sorted(runs.glob("searches/*"))},
    }
    return json.loads(json.dumps(left).replace(str(work), "WORK"))


def execute_all(work: Path, python: str, only: str) -> dict[str, Any]:
    make_inputs(work)
    left = {name: execute(name, line, work, python) for name, line in TWO_CORES.items() if fnmatch(name, only)}
    with ThreadPoolExecutor(2) as pool:
        lines = {name: line for name, line in ONE_CORE.items() if fnmatch(name, only)}
        waiting = {name: pool.submit(execute, name, line, work, python) for name, line in lines.items()}
        return left | {name: future.result() for name, future in waiting.items()}


# ---- what is read: all that follows the files and their keys ---------------------------------------------------------


def run_folders(runs: Path) -> list[Path]:
    return sorted(path.parent for path in runs.glob("*/spec.yaml"))


def checkpoint(runs: Path) -> int:
    """The step of the latest one; -1: there is none."""
    return max((int(path.name[:9]) for path in runs.glob("*/checkpoint/?????????-*.pt")), default=-1)


def read_result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text()) if (run / "result.json").exists() else {}


def name_of(run: Path) -> str:
    """A name without the fingerprint, so that a run whose fingerprint changed is still found."""
    spec = yaml.safe_load((run / "spec.yaml").read_text())
    rate = spec["hyperparameters"].get("lr", spec["hyperparameters"]["head_lr"])
    return f"{spec['method']} on {spec['backbone']}, {spec['part']}, seed {spec['seed']}, lr {rate:.6g}"


def read_run(run: Path) -> dict[str, Any]:
    """All of a run that depends on neither time nor place."""
    status, result = json.loads((run / "status.json").read_text()), read_result(run)
    spec = yaml.safe_load((run / "spec.yaml").read_text())
    known = {"fingerprint": run.name, "spec": spec, "state": status["state"], "reason": status["reason"]}
    if not result:
        return known
    points = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    figures = ("metrics", "parameters", "train_flops", "peak_memory_bytes", "delta_bytes", "steps", "images")
    return {
        **known,
        **{key: result[key] for key in figures},
        "spec in result": result["spec"] == spec,
        "delta": read_delta(run / "delta.safetensors"),
        "confusions": {key: sha256(array) for key, array in np.load(run / "confusions.npz").items()},
        "curve": [{key: value for key, value in point.items() if key != "images_per_second"} for point in points],
        "samples": {path.name: sha256(path.read_bytes()) for path in sorted((run / "samples").iterdir())},
    }


def read_delta(path: Path) -> dict[str, str]:
    """Digests of header and tensors, from the file's bytes: numpy knows no bfloat16."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:start])
    digests = {f"header {key}": sha256(text.encode()) for key, text in sorted(entries.pop("__metadata__").items())}
    for name, entry in sorted(entries.items()):
        begin, end = (start + offset for offset in entry["data_offsets"])
        digests[name] = sha256(f"{entry['dtype']}{entry['shape']}".encode() + content[begin:end])
    return digests


def read_search(folder: Path) -> dict[str, Any]:
    recipes = sorted([*folder.glob("best.yaml"), *folder.glob("front/*.yaml")])
    return {
        **{name: json.loads((folder / f"{name}.json").read_text()) for name in ("search", "trials")},
        "recipes": {path.name: yaml.safe_load(path.read_text()) for path in recipes},
    }


def conditions(work: Path) -> dict[str, Any]:
    """What the last bits depend on besides the code."""
    recorded = next((read_result(path.parent)["provenance"] for path in work.glob("runs/*/*/result.json")), {})
    return {key: recorded[key] for key in ("packages", "device", "threads") if key in recorded}


def sha256(content: bytes | np.ndarray) -> str:
    if isinstance(content, np.ndarray):
        content = f"{content.dtype.str}{content.shape}".encode() + content.tobytes()
    return hashlib.sha256(content).hexdigest()


def differences(expected: Any, found: Any, where: str) -> Iterator[str]:
    """One line per value."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*expected, *found]):
            if key in expected and key in found:
                yield from differences(expected[key], found[key], f"{where} / {key}")
            else:
                yield f"{where} / {key}: {'gone' if key in expected else 'new'}"
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, f"{where}[{index}]")
    elif repr(expected) != repr(found):
        yield f"{where}: {expected!r} -> {found!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--work", type=Path, help="scratch folder, empty or new, to keep what is executed")
    parser.add_argument("--python", default=sys.executable, help="of the environment that is driven")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="commands whose names match, such as 'plan-*'")
    given = parser.parse_args()
    recorded = json.loads(given.file.read_text()) if given.what == "check" else {}
    with tempfile.TemporaryDirectory(prefix="bits-") as scratch:
        work = (given.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            parser.error(f"--work {work}: not empty")
        left = execute_all(work, os.path.abspath(given.python), given.only)
        under = conditions(work)
    for text in differences(recorded.get("conditions", under), under, "note: conditions"):
        print(text)
    expected = recorded.get("left", left)
    found = [
        text
        for name, came in left.items()
        for text in differences(expected[EQUAL.get(name, name)], came, name)
    ]  # fmt: skip
    runs = sum(len(came["runs"]) for came in left.values())
    if given.what == "record":
        found += [f"{name}: failed" for name, came in left.items() if came["exit code"]]
    print(*found, f"{len(found)} differences, {runs} runs", sep="\n")
    if given.what == "record" and not found:
        kept = {name: came for name, came in left.items() if name not in EQUAL}
        given.file.write_text(json.dumps({"conditions": under, "left": kept}, indent=1) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
