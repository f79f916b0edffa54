"""One imported pipeline for all tests that only look at it."""

import pytest

from convert.to_arrays import import_pipeline
from tests.convert.pipelines import random_tensors, write_pipeline


@pytest.fixture(scope="session")
def tensors():
    return random_tensors()


@pytest.fixture(scope="session")
def source(tmp_path_factory, tensors):
    return write_pipeline(tmp_path_factory.mktemp("convert") / "source", tensors)


@pytest.fixture(scope="session")
def imported(source):
    import_pipeline(source, source.with_name("imported"))
    return source.with_name("imported")
