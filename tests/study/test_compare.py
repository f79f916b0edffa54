"""Tables, standing and figures from records whose answers are known."""

import copy
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.study import compare, record
from qvgen_jax.study.figures import write_figures
from qvgen_jax.study.job import chosen_variants, run_study
from qvgen_jax.study.tables import stage_section, write_tables
from tests.study.records import cells, grid, synthetic

LOSSES = {"default": 0.10, "plain_qat": 0.15, "rank_8": 0.08, "decay_end_100": 0.12}
VARIANTS = (*LOSSES, "full_rank_kept")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for cell in cells("screening", VARIANTS):
        loss = LOSSES.get(cell.variant, math.nan) * (1 + 0.02 * cell.seed)
        content = synthetic(cell, loss * (1 if cell.bits == (4, 4) else 3))
        record.write(record.path_of(folder, cell), content)
    for cell in cells("finals", ("default", "released")):
        strict = {"default": 0.9, "released": 0.5}[cell.variant]
        record.write(record.path_of(folder, cell), synthetic(cell, 0.1, strict))
    return folder


def rows(study, stage: str, bits: tuple[int, int]) -> dict[str, dict]:
    make = compare.screening_rows if stage == "screening" else compare.final_rows
    return {row["variant"]: row for row in make(record.read_stage(study, stage), bits)}


def test_screening_is_sorted_and_a_diverged_variant_is_last(study):
    found = rows(study, "screening", (4, 4))
    assert list(found) == ["rank_8", "default", "decay_end_100", "plain_qat", "full_rank_kept"]
    assert found["default"]["seeds"] == 1  # The one that all have.
    assert found["default"]["loss"] == pytest.approx(0.1, abs=1e-3)
    assert math.isnan(found["full_rank_kept"]["loss"])
    assert found["full_rank_kept"]["loss_change"] is None


def test_changes_are_paired_with_the_default_of_the_same_seed(study):
    found = rows(study, "screening", (4, 4))
    change = found["plain_qat"]["loss_change"]
    assert change.value == pytest.approx(0.5, abs=0.02)  # 0.15 to seed 0's 0.10, not to the mean.
    assert change.low < change.value < change.high
    assert found["plain_qat"]["drift_change"].value == pytest.approx(0.5)
    assert found["default"]["loss_change"] is None


def test_a_variant_of_one_seed_takes_none_from_the_others():
    made = cells("finals", ("default", "released", "unguided_last"))
    records = [synthetic(cell, 0.1 * (1 + cell.seed)) for cell in made]
    found = {row["variant"]: row for row in compare.screening_rows(records, (4, 4))}
    assert {name: row["seeds"] for name, row in found.items()} == {
        "default": 3,
        "released": 3,
        "unguided_last": 1,
    }
    assert found["released"]["loss"] == pytest.approx(0.2, rel=0.05)
    assert found["unguided_last"]["loss"] == pytest.approx(0.1, rel=0.05)
    assert found["unguided_last"]["loss_change"].value == pytest.approx(0.0, abs=1e-9)


def test_the_spread_of_the_default_is_what_luck_does(study):
    records = record.read_stage(study, "screening")
    # Losses as 1, 1.02, 1.04 at both bit-widths: a standard deviation of 0.02 / 1.02.
    found, freedom = compare.luck(records)
    assert found == pytest.approx(2.8 * 0.02 / 1.02, rel=0.1)
    assert freedom == 4
    assert compare.luck([r for r in records if r["seed"] == 0]) is None


def test_what_is_a_fifth_worse_on_every_clip_is_so_without_doubt(study):
    theirs = {0: synthetic(cells("screening", ("default",))[0], 0.1)}
    worse = copy.deepcopy(theirs)
    for what, key in (("held_out", "per_clip"), ("drift", "per_video")):
        worse[0][what][key] = [1.2 * value for value in theirs[0][what][key]]
        assert compare.change(worse, theirs, what) == pytest.approx((0.2, 0.2, 0.2))


def test_finals_pool_seeds_and_compare_video_by_video(study):
    found = rows(study, "finals", (4, 4))
    assert list(found) == ["default", "released"]
    worse = found["released"]
    assert (worse["count"], worse["total"]) == (90, 180)
    assert worse["to_full_precision"].value == -0.5
    assert worse["to"]["default"].value == pytest.approx(-0.4)
    assert found["default"]["to"] == {}
    assert compare.full_precision(record.read_stage(study, "finals"))[1:] == (60, 60)


def test_finals_are_compared_with_the_recipe_too(study):
    records = record.read_stage(study, "finals")
    found = {row["variant"]: row for row in compare.final_rows(records, (4, 4), ("released",))}
    assert found["default"]["to"]["released"].value == pytest.approx(0.4)
    assert found["released"]["to"] == {}
    text = "\n".join(stage_section("finals", records, "released"))
    assert "| to default, points | to released, points |" in text
    assert re.search(r"\| default \|.* \| reference \| \+40\.0 \(", text)
    assert re.search(r"\| released \|.* \| -40\.0 \([^|]*\| reference \|", text)


def test_a_recipe_that_is_no_variant_is_told(tmp_path):
    with pytest.raises(
        UserError, match="recipe='hadamrd' is no variant of the grid; there are def"
    ):
        run_study({**grid("finals"), "recipe": "hadamrd"}, tmp_path)


def test_standing_is_the_mean_ratio_to_the_default_and_needs_both_widths(study):
    widths = ((4, 4), (3, 3))
    places = compare.standing(record.read_stage(study, "screening"), widths)
    assert places["default"] == 1
    assert places["rank_8"] == pytest.approx(0.8, abs=0.02)
    assert places["full_rank_kept"] == math.inf
    only = [r for r in record.read_stage(study, "screening") if r["variant"] != "rank_8"]
    some = [r for r in record.read_stage(study, "screening") if tuple(r["bits"]) == (4, 4)]
    one_width = [r for r in some if r["variant"] == "rank_8"]
    assert "rank_8" not in compare.standing([*only, *one_width], widths)
    assert compare.standing(some, widths) == {}  # Half a screening ranks nobody.


def test_finalists_are_the_best_and_those_that_always_take_part(study):
    asked = finals_of((*VARIANTS, "released"), without=("released",))
    assert chosen_variants(asked, study) == ["default", "plain_qat", "rank_8", "released"]
    asked["finalists"]["names"] = ("decay_end_100",)
    assert chosen_variants(asked, study) == ["decay_end_100"]


def finals_of(names: tuple[str, ...], /, **rule) -> dict:
    asked = grid("finals")
    asked["variants"] = {name: asked["variants"][name] for name in names}
    asked["finalists"] = {**asked["finalists"], "best": 1, **rule}
    return asked


def test_finalists_are_not_chosen_from_a_part_of_the_screening(study, tmp_path):
    with pytest.raises(UserError, match=r"lacks released-w4a4-0 \(no result\), released-w3a3-0"):
        chosen_variants(finals_of((*VARIANTS, "released")), study)
    for cell in cells("screening", VARIANTS):
        if cell.bits == (4, 4):
            record.write(record.path_of(tmp_path, cell), synthetic(cell, 0.1))
    with pytest.raises(UserError, match=r"default-w3a3-0 \(no result\).* and 2 more: finish"):
        chosen_variants(finals_of(VARIANTS), tmp_path)
    changed = finals_of(VARIANTS)
    changed["finalists"]["grid"]["variants"]["rank_8"] = {"quant.rank": 4}
    with pytest.raises(UserError, match=r"rank_8-w4a4-0 \(its config changed \(quant.rank: 8 the"):
        chosen_variants(changed, study)


def test_what_the_screening_cannot_rank_is_in_the_finals_and_not_always_in_the_screening():
    asked = grid("finals")
    assert (
        {"unguided_last", "truth_blend_5", "plain_qat_equal_ops"}
        <= set(asked["finalists"]["always"])
        <= set(asked["variants"])
    )
    assert "unguided_last" not in grid("screening")["variants"]


def test_the_tables_say_what_was_found_and_what_failed(study, tmp_path):
    failed = study / "screening" / "hadamard-w4a4-0.failed.json"
    record.write(failed, {"log": ["x", "error: no such option"], "exit_code": 2})
    write_tables(study, tmp_path)
    failed.unlink()
    text = (tmp_path / "tables.md").read_text()
    assert text.index("## Screening") < text.index("## Finals")
    assert "mean over 9 timesteps and 16 clips" in text
    assert re.search(r"may be 5\.\d % apart .* 4 degrees of freedom.* of 4 comparisons", text)
    assert "by commit" not in text
    assert re.search(r"\| rank_8 \| 1 \| 0\.080\d \| -20\.\d % \(", text)
    assert "| full_rank_kept | 1 | not finite |" in text
    assert "| full precision | | 100.0 % (60/60, 94.0 to 100.0) | reference |" in text
    assert "| released | 3 | 50.0 % (90/180" in text
    assert "hadamard-w4a4-0: `error: no such option`" in text
    dirty = record.read(study / "screening" / "rank_8-w4a4-0.json")
    dirty["code"] = {"commit": "fedcba9876543210", "dirty": True}
    section = "\n".join(stage_section("screening", [*record.read_stage(study, "finals"), dirty]))
    assert "13 cells, by commit: 01234567 (12), fedcba98 with uncommitted changes (1)." in section
    assert max(len(line.split("|")) for line in text.splitlines()) == 11


def test_figures_are_svg_files_that_do_not_change_by_drawing_again(study, tmp_path):
    written = write_figures(study, tmp_path)
    assert sorted(path.stem for path in written) == [
        "end_of_decay",
        "gradient_norm",
        "loss_at_boundaries",
        "small_singular_values",
    ]
    before = [path.read_bytes() for path in written]
    write_figures(study, tmp_path)
    assert [path.read_bytes() for path in written] == before
    for path in written:
        root = ElementTree.parse(path).getroot()
        text = " ".join(part.strip() for part in root.itertext() if part.strip())
        assert "W4A4" in text
        assert "W3A3" in text


def test_a_figure_without_its_runs_is_not_drawn(study, tmp_path):
    few = tmp_path / "few"
    for cell in cells("screening", ("default",)):
        record.write(record.path_of(few, cell), synthetic(cell, 0.1))
    assert [path.stem for path in write_figures(few, tmp_path)] == ["loss_at_boundaries"]


def test_a_verdict_matrix_has_a_wider_interval_over_seeds_than_over_videos_alone():
    from qvgen_jax.evaluation.intervals import crossed_difference, paired_difference

    rng = np.random.default_rng(0)
    teacher = np.ones(400)
    seeds = np.stack([rng.random(400) < share for share in (0.95, 0.8, 0.65)])
    crossed = crossed_difference(seeds, teacher)
    pooled = paired_difference(seeds.ravel(), np.tile(teacher, 3))
    assert crossed.value == pytest.approx(pooled.value)
    assert crossed.high - crossed.low > 3 * (pooled.high - pooled.low)
