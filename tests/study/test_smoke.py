"""The smoke grid for real: two cells train, ship, are measured, and come back as a table."""

import json
from pathlib import Path

import pytest

from qvgen_jax.study.job import run_study
from tests.study.records import grid

ROOT = Path(__file__).parents[2]


@pytest.mark.by_hand
def test_the_smoke_grid_runs_end_to_end_and_then_has_nothing_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    asked = grid("smoke", scratch=str(tmp_path / "scratch"))
    asked["common"] |= {
        "data.encoded": str(tmp_path / "encoded"),
        "evaluate.held_out_encoded": str(tmp_path / "encoded"),
        "evaluate.reference": str(tmp_path / "reference"),
        "evaluate.videos": 2,
    }
    docs = run_study(asked, tmp_path / "study")
    text = (docs / "tables.md").read_text()
    assert "| plain_qat |" in text
    assert (docs / "gradient_norm.svg").is_file()
    found = json.loads((tmp_path / "study/smoke/default-w4a4-0.json").read_text())
    assert found["curves"]["rank"] == [2, 1, 0, 0, 0, 0]
    assert len(found["held_out"]["per_clip"]) == 32
    assert 0 < found["held_out"]["mean"]["normalised"] < 1
    assert 0 < found["drift"]["relative"] < 1
    assert [len(row["strict_videos"]) for row in found["judge"]] == [2, 2]

    capfd.readouterr()
    run_study(asked, tmp_path / "study")
    assert capfd.readouterr().out == "2 of 2 cells are done\n"
    assert (docs / "tables.md").read_text() == text
