"""The report of a run: pages that open from disk, see `build.py`."""

from qvgen_jax.evaluation.report.build import write_report
from qvgen_jax.evaluation.report.records import read_metrics

__all__ = ["read_metrics", "write_report"]
