"""`--parity-table FILE` writes what the tests measured; see `tests/parity/table.py`."""

from pathlib import Path

import pytest

from tests.parity import table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-table", type=Path, help="write the parity table (without -n)")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("parity_table")
    if path is not None:
        table.write(path)
