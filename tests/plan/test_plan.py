"""Plans of the shipped configs word by word, and what they must add up to."""

import pytest

from tests.golden.plans import FOLDER, TARGETS, planned


@pytest.mark.parametrize("name", TARGETS)
def test_a_shipped_config_has_the_plan_that_is_kept(name):
    # After a change that is meant: `python -m tests.golden.plans`, and read what it changed.
    assert planned(name) == (FOLDER / f"{name}.txt").read_text()
