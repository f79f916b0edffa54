"""Where the campaign's numbers go: to the file that QVGEN_FUZZ_RESULT names, if it does."""

import json
import os
from pathlib import Path

import pytest

from tests.fuzz.campaign import TALLY


def pytest_sessionfinish(session):
    # Where everything is refused, the inputs never came to what is tested.
    if blind := [
        name for name, tally in TALLY.items() if tally["tried"] > 99 > 50 * tally["right"]
    ]:
        raise pytest.UsageError(f"nearly everything was refused of {', '.join(blind)}")
    if path := os.environ.get("QVGEN_FUZZ_RESULT"):
        Path(path).write_text(json.dumps(TALLY))
