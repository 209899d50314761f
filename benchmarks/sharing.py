"""The benefit of sharing: runs on cached features, evaluations on cached features, runs side by side.

Whole runs are timed, by the functions that `harness run`, `compare` and `search` call: building the network, training,
the evaluation at the end, and writing the results. The cells are those of a search over a linear probe.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import Ratio, Table, in_turn
from benchmarks.setting import Setting
from harness.cells.resolve import Cell
from harness.data.splits import split_samples
from harness.engine.cost import cached_step_cost
from harness.engine.evaluation import Predictor, confusion_matrices
from harness.engine.options import ExecutionOptions
from harness.engine.run import execute
from harness.engine.side_by_side import execute_side_by_side
from harness.features.cached_prefix import CachedPrefix, EvaluationPrefix
from harness.features.keys import FeatureCache
from harness.features.policy import EvaluationCachePolicy
from harness.models.backbones.weights import tensors_digest
from harness.runs.state import RunState
from harness.runs.store import RunStore

METHOD = "linear"
CACHE_SIZE = ExecutionOptions().cache_size
LOWEST_LR, HIGHEST_LR = 1e-4, 1e-2


def table(setting: Setting, backbones: Sequence[str], trials: int) -> Table:
    """With the head `linear`, which makes it a linear probe, and with the head of the other tables."""
    result = Table(
        f"Runs of `{METHOD}` that share frozen features",
        ["backbone", "head", "seconds of", "over seconds of", "seconds", "ratio", "aim for the linear probe"],
        f"{setting.budget.steps} steps of {setting.budget.batch_size} images and the one evaluation, in "
        f"{setting.rounds} rounds.",
    )
    for backbone, head in itertools.product(backbones, dict.fromkeys(("linear", setting.head))):
        at = replace(setting, head=head)
        whole, cached_whole = _evaluations(at, backbone)
        (alone, together, writing, cached), found = _runs(at, backbone, trials)
        one_by_one = [trials * seconds for seconds in alone]
        side_by_side = f"{trials} runs side by side"
        for above, below, some, others, aim in (
            (side_by_side, "one run", together, alone, "at most 2, of 16"),
            (f"{trials} runs, each as long as one", side_by_side, one_by_one, together, ""),
            ("a run that writes features", "a run", writing, alone, ""),
            ("a run", "a run on cached features", alone, cached, "at least 5"),
            ("an evaluation", "one on cached features", whole, cached_whole, "at least 3"),
        ):
            seconds = f"{statistics.median(some):.2f} / {statistics.median(others):.2f}"
            result.add(backbone, head, above, below, seconds, Ratio.of(some, others), aim)
        result.notes.append(
            f"{backbone}, {head}: the run on cached features found {found['training']:.0%} of its steps and "
            f"{found['evaluation']:.0%} of its evaluation; the cost model decides whether those of training are cached."
        )
    return result


def run_cells(
    setting: Setting,
    cells: Sequence[Cell],
    store: RunStore,
    *,
    side_by_side: bool = False,
    cache_size: int = 0,
    expected_reuses: int = 0,
) -> float:
    """Seconds to execute cells that are not done yet, side by side or one after the other.

    `expected_reuses`: the expected number of further runs on the same images.
    Raises `RuntimeError` with the runs' output if one ends without a result.
    """
    options = ExecutionOptions(runs=store.root, tracking="off", workers=setting.workers, cache_size=cache_size)
    with contextlib.redirect_stderr(io.StringIO()) as output:
        started = setting.clock()
        if side_by_side:
            execute_side_by_side(cells, store, options, quiet=True, expected_reuses=expected_reuses)
        else:
            for cell in cells:
                execute(cell, store, options, quiet=True, expected_reuses=expected_reuses)
        seconds = setting.clock() - started
    if any(store.outcome(store.folder(cell.spec)).state is not RunState.DONE for cell in cells):
        raise RuntimeError(f"a run of the benchmark failed: {output.getvalue()}")
    return seconds


def _runs(setting: Setting, backbone: str, trials: int) -> tuple[list[tuple[float, ...]], dict[str, float]]:
    """Seconds per round: of a run, of `trials` side by side, of one that writes features, of one that reads them.

    Also the shares of training and evaluation that the last of these found in the cache.
    """
    ratio = (HIGHEST_LR / LOWEST_LR) ** (1 / max(1, trials - 1))
    cells = [setting.cell(backbone, METHOD, head_lr=LOWEST_LR * ratio**trial) for trial in range(max(2, trials))]
    # Counted once for all runs of a study, and not part of what is compared: `_store` copies it.
    if cached_step_cost(cells[0], setting.network(cells[0]), _counted(setting)) is None:
        raise RuntimeError(f"a step of {METHOD} on {backbone} fails")
    rounds = []
    for _ in range(setting.rounds):
        with _store(setting) as store:
            alone = run_cells(setting, cells[:1], store)
        with _store(setting) as store:
            together = run_cells(setting, cells[:trials], store, side_by_side=True)
        with _store(setting) as store:
            writing = run_cells(setting, cells[:1], store, cache_size=CACHE_SIZE, expected_reuses=trials - 1)
            cached = run_cells(setting, cells[1:2], store, cache_size=CACHE_SIZE)
            found = store.folder(cells[1].spec).read_result().reuse.model_dump()
        rounds.append((alone, together, writing, cached))
    return list(zip(*rounds, strict=True)), found


def _evaluations(setting: Setting, backbone: str) -> tuple[list[float], list[float]]:
    """Seconds per round: of an evaluation, and of one on cached features."""
    cell = setting.cell(backbone, METHOD)
    network, pretrained = setting.network(cell), setting.pretrained(cell)
    stages, digest = network.backbone.count_frozen_stages(), tensors_digest(pretrained)
    _, samples = split_samples(cell.dataset, cell.spec.part, cell.spec.budget.dev_fraction)

    def evaluation(prefix: EvaluationPrefix | None) -> float:
        budget, scale = cell.spec.budget, cell.dataset.scale
        predictor = Predictor(network, pretrained.mean, pretrained.std, scale, budget, setting.device, prefix)
        started = setting.clock()
        confusion_matrices(predictor, cell.dataset, samples)
        if prefix is not None:
            prefix.close()
        return setting.clock() - started

    with _store(setting) as store:
        cache = FeatureCache(cell, store, digest, pretrained.norm, setting.fabric, CACHE_SIZE)

        def on_cached() -> float:
            policy = EvaluationCachePolicy(cache.limit)
            prefix = CachedPrefix(network.backbone, stages, setting.device, cache.evaluation(), policy)
            return evaluation(EvaluationPrefix(prefix))

        on_cached()  # which writes the features
        seconds = in_turn({"whole": lambda: evaluation(None), "cached": on_cached}, setting.rounds)
    return seconds["whole"], seconds["cached"]


def _counted(setting: Setting) -> Path:
    """The folder of the costs of steps that were counted."""
    return setting.scratch / "costs"


@contextlib.contextmanager
def _store(setting: Setting) -> Iterator[RunStore]:
    """A private run store with a feature cache, removed afterwards."""
    with tempfile.TemporaryDirectory(dir=setting.scratch) as place:
        store = RunStore(Path(place))
        if _counted(setting).is_dir():
            shutil.copytree(_counted(setting), store.cache)
        yield store
