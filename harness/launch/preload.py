"""Imported once by the process that jobs are forked from, so that no job spends time on these imports."""

import contextlib
import gc
from unittest import mock

from harness.util.quiet import quiet_imports

# mmengine asks whether there is a GPU when it is imported. After that answer no forked process could use one.
with quiet_imports(), mock.patch("torch.cuda.is_available", return_value=False):
    import mmseg.models.decode_heads
    import mmseg.models.necks  # noqa: F401

    import harness.engine.side_by_side
    import harness.launch.worker  # noqa: F401
    from harness.tracking.mlflow_store import load_mlflow

    with contextlib.suppress(Exception):  # tracking says what is wrong with MLflow, and stops no run
        load_mlflow()

gc.freeze()  # a job's own collections would visit, and thereby copy, what they share
