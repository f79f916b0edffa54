"""What every test shares: how programs are compiled, and the compiled programs."""

import os
from pathlib import Path

import jax
import pytest

from configs.study_tiny import QUICK_TO_COMPILE

# A test's program runs a few times on little: what LLVM's passes cost is never won back. The last
# of equal flags counts. Set before anything asks JAX for its devices.
os.environ.setdefault("XLA_FLAGS", f"{QUICK_TO_COMPILE} --xla_backend_optimization_level=0")


def _share_compiled_programs(folder: Path) -> None:
    """One cache for both workers and the programs that tests start: compiling is most of a run."""
    settings = {"jax_compilation_cache_dir": str(folder)}
    settings |= {"jax_persistent_cache_min_compile_time_secs": 1.0}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    # A worker's folder lies in the one of the whole run, which is new for every run.
    whole = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    _share_compiled_programs(whole / "compiled")
