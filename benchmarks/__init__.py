"""What the harness costs, measured side by side in one process run: `python -m benchmarks` from the repository's root.

Every figure is a ratio of two things that were timed in turn, the median over rounds, for a machine is never quiet.
"""
