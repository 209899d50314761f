"""Imported once by the process that jobs are forked from; everything a job imports later is imported here already."""

from harness.util.quiet import quiet_imports

with quiet_imports():
    import mmseg.models.decode_heads
    import mmseg.models.necks  # noqa: F401

    import harness.engine.run
    import harness.tracking.mirror  # noqa: F401
