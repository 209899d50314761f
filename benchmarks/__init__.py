"""Measures the harness's own cost in one process: `python -m benchmarks` from the repository's root.

Every number is a ratio of two measurements that alternate, the median over rounds, because machines are never idle.
"""
