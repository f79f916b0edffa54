"""The tree of videos that VBench reads, on a list of prompts in its format."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qvgen_jax.data.video import read_video
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation import vbench
from qvgen_jax.evaluation.asked import seed_of
from qvgen_jax.evaluation.vbench import (
    PAPER,
    VBENCH_2,
    read_prompts,
    read_scores,
    rows_of,
    write_tree,
)

CONSISTENCY = ["overall_consistency", "aesthetic_quality", "imaging_quality"]
SUBJECT = ["subject_consistency", "dynamic_degree", "motion_smoothness"]
INFO = [
    {"prompt_en": "a person swimming in ocean", "dimension": SUBJECT},
    {"prompt_en": "a dog's bath, slow motion", "dimension": CONSISTENCY},
    {"prompt_en": "alley", "dimension": ["scene", "background_consistency"]},
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a cat", "dimension": CONSISTENCY},
    {"prompt_en": "a bus", "dimension": CONSISTENCY},
]


class Painter:
    """A pipeline whose videos are of one grey, by prompt and seed."""

    defaults = {"fps": 8, "steps": 4, "guidance_scale": 3.0}  # noqa: RUF012

    def __init__(self):
        self.asked = []

    def generate(self, prompts, seeds, batch_size):
        self.asked += list(zip(prompts, seeds, strict=True))
        greys = [self.grey(*pair) for pair in zip(prompts, seeds, strict=True)]
        return np.stack([np.full((5, 16, 16, 3), grey, np.uint8) for grey in greys])

    @staticmethod
    def grey(prompt: str, seed: int) -> int:
        return 20 + (seed + len(prompt)) % 200


@pytest.fixture
def info(tmp_path):
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(INFO))
    return path


@pytest.fixture(autouse=True)
def a_digest(monkeypatch):
    monkeypatch.setattr(vbench, "made_by", lambda pipe: str(pipe.defaults))


def test_five_videos_of_every_prompt_that_the_papers_dimensions_score(info):
    rows = rows_of(read_prompts(info), PAPER)
    assert len(rows) == 25
    assert rows[5].file == "overall_consistency/a dog's bath, slow motion-0.mp4"
    assert {row.folder for row in rows} == {"overall_consistency", "subject_consistency", "scene"}
    assert {name for row in rows for name in row.dimensions} == set(PAPER)
    assert len({row.seed for row in rows}) == 25


def test_a_seed_depends_on_prompt_and_index_alone(info):
    rows = rows_of(read_prompts(info), ["scene"])
    assert [row.seed for row in rows] == [seed_of("alley", i) for i in range(5)]
    assert seed_of("alley", 0, seed=1) != seed_of("alley", 0)
    assert all(0 <= row.seed < 2**31 for row in rows)


def test_smoke_takes_two_prompts_of_each_folder(info):
    rows = rows_of(read_prompts(info), PAPER, smoke=True)
    assert len(rows) == (1 + 2 + 1) * 2
    assert rows == [row for row in rows_of(read_prompts(info), PAPER) if row in rows]


def test_vbench_2_names_videos_by_the_first_180_characters_and_wants_more_of_diversity(info):
    long = "b" * 400
    twice = [{"prompt_en": "an elephant", "dimension": ["Multi-View_Consistency"]}] * 2
    asked = [*twice, {"prompt_en": long, "dimension": ["Diversity"]}]
    info.write_text(json.dumps(asked))
    names = ["Multi-View_Consistency", "Diversity"]
    rows = rows_of(read_prompts(info, VBENCH_2), names, suite=VBENCH_2)
    views, diverse = rows[:3], rows[3:]
    assert [row.file for row in views] == [f"{names[0]}/an elephant-{i}.mp4" for i in range(3)]
    assert [row.file for row in diverse] == [f"Diversity/{long[:180]}-{i}.mp4" for i in range(20)]
    assert {row.prompt for row in diverse} == {long}
    assert len({row.seed for row in rows}) == 23
    info.write_text(json.dumps([*asked, {"prompt_en": long + "!", "dimension": ["Diversity"]}]))
    with pytest.raises(UserError, match="two prompts are named 'Diversity/bbb"):
        rows_of(read_prompts(info, VBENCH_2), names, suite=VBENCH_2)


def test_a_tree_is_resumed_and_made_in_parts_and_holds_videos_alone(info, tmp_path):
    rows, pipe = rows_of(read_prompts(info), ["scene", "dynamic_degree"]), Painter()
    out = write_tree(pipe, tmp_path / "one", rows, name="ours", batch_size=3)
    found = sorted(path.relative_to(out / "videos") for path in (out / "videos").rglob("*.mp4"))
    assert found == sorted(Path(row.file) for row in rows)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "videos"]
    frame = read_video(out / "videos" / rows[3].file)[0]
    assert frame.mean() == pytest.approx(pipe.grey(rows[3].prompt, rows[3].seed), abs=2)

    (out / "videos" / rows[7].file).unlink()
    pipe.asked.clear()
    write_tree(pipe, out, rows, name="ours", batch_size=3)
    assert pipe.asked == [(rows[7].prompt, rows[7].seed)]

    for part in ((1, 2), (0, 2)):
        write_tree(pipe, tmp_path / "parts", rows, name="ours", batch_size=4, part=part)
    for row in rows:
        one, other = (tmp_path / name / "videos" / row.file for name in ("one", "parts"))
        assert one.read_bytes() == other.read_bytes()


def test_another_models_videos_are_not_added_to_a_tree(info, tmp_path):
    rows, pipe = rows_of(read_prompts(info), ["scene"]), Painter()
    write_tree(pipe, tmp_path / "tree", rows, name="ours", batch_size=5)
    pipe.defaults = {**pipe.defaults, "steps": 5}
    with pytest.raises(UserError, match="holds videos of other made_by, settings: delete"):
        write_tree(pipe, tmp_path / "tree", rows, name="ours", batch_size=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not read as JSON .* give the VBench_full_info.json"),
        ("{}", "holds no list of prompt_en and dimension"),
        ('[{"prompt_en": "a", "dimension": "scene"}]', "holds no list"),
        ('[{"prompt_en": "../a", "dimension": ["scene"]}]', "cannot be a file's name"),
        (json.dumps([{"prompt_en": "a" * 252, "dimension": ["scene"]}]), "cannot be a file's name"),
    ],
)
def test_what_is_no_list_of_prompts_is_told(info, content, message):
    info.write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(info)


def test_a_dimension_that_is_none_is_told(info):
    with pytest.raises(UserError, match="no dimension beauty; there are aesthetic_quality, backg"):
        rows_of(read_prompts(info), ["scene", "beauty"])


def test_scores_stand_beside_the_papers(tmp_path):
    (tmp_path / "a_eval_results.json").write_text(
        json.dumps({"scene": [0.3142, [{"video_path": "x", "video_results": 0.3}]]})
    )
    (tmp_path / "b_eval_results.json").write_text(json.dumps({"dynamic_degree": [0.5, []]}))
    scores = read_scores(tmp_path)
    assert scores == {"scene": pytest.approx(31.42), "dynamic_degree": 50.0}
    alone = vbench.table({"ours": scores}, ["scene", "colour"]).splitlines()
    assert alone == ["| | scene | colour |", "|---|---|---|", "| ours | 31.42 | not scored |"]
    lines = vbench.table({"ours": scores}).splitlines()
    assert lines[2].split(" | ")[4] == "50.00"
    assert lines[2].count("not scored") == 6
    assert lines[3].startswith("| the paper, CogVideoX-2B bf16 | 59.15 |")
    shutil.copy(tmp_path / "a_eval_results.json", tmp_path / "c_eval_results.json")
    (tmp_path / "c_eval_results.json").write_text('{"scene": "good"}')
    with pytest.raises(UserError, match="has no score of scene; score again"):
        read_scores(tmp_path)
