"""Files that are there completely or as they were."""

import json
from concurrent.futures import ThreadPoolExecutor

from qvgen_jax.json_file import write_json


def test_a_file_that_several_write_at_once_is_one_of_theirs(tmp_path):
    path = tmp_path / "some.json"

    def write_often(writer: int) -> None:
        for _ in range(200):
            write_json(path, [writer] * 100)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_often, range(4)))  # What failed in one is raised here.
    assert len(set(json.loads(path.read_text()))) == 1
    assert list(tmp_path.iterdir()) == [path]
