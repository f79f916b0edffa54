"""The table's arithmetic, on videos whose verdict is known because the renderer drew them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from qvgen_jax.data.moving_shapes import COLOURS, render
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation import answers
from qvgen_jax.evaluation.asked import held_out
from qvgen_jax.evaluation.evaluate import Variant, evaluate_variants
from qvgen_jax.evaluation.measures import psnr
from qvgen_jax.evaluation.samples import read_prompts
from qvgen_jax.evaluation.table import table

CONFIG = {
    "evaluate": {"videos": 4, "seed": 5, "reference": "", "shown": 2, "pixels": True},
    "sample": {"batch_size": 2, "prompts": "held_out"},
}
SIZE = {"num_frames": 17, "height": 64, "width": 64}
NETWORK = SimpleNamespace(config="tiny", states=({"kernel": np.ones(3)},))
WANTED = [each.wanted for each in held_out(360, 0)]


class Renderer:
    """Stands where a pipeline stands, and draws each prompt perfectly, or every `wrong`th badly."""

    def __init__(self, wrong: int = 0):
        self.wrong, self.calls, self.decoded = wrong, 0, 0
        self.transformer = self.vae = self.text_encoder = NETWORK
        self.scheduler = "unipc"
        self.defaults = {"steps": 25, "guidance_scale": 2.5, "fps": 8, "wrong": wrong, **SIZE}

    def sample_latents(self, prompts, seeds, batch_size):
        """What shall be drawn: one frame of two values, the seed and whether it is drawn badly."""
        self.calls += 1
        bad = [self.wrong > 0 and seed % self.wrong == 1 for seed in seeds]
        return np.stack([np.array(seeds), bad], 1)[:, None, None, :, None].astype(np.float32)

    def to_frames(self, latents, batch_size):
        self.decoded += 1
        clips = []
        for seed, bad in latents[:, 0, 0, :, 0].astype(int):
            wanted = WANTED[seed - 5]
            if bad:
                other = next(colour for colour in COLOURS if colour != wanted.colour)
                wanted = wanted._replace(colour=other)
            clips.append(render(wanted, np.random.default_rng(seed)))
        return np.stack(clips)


def compare(workdir, good, bad, config=CONFIG, part=(0, 1)):
    variants = {"Full precision": Variant(lambda: good), "Bad": Variant(lambda: bad, packed=True)}
    return evaluate_variants(config, workdir, variants, part)


def test_the_table_counts_pairs_and_finished_slices_are_not_computed_again(tmp_path):
    good, bad = Renderer(), Renderer(wrong=2)
    result = compare(tmp_path, good, bad)
    reference, worse = result["variants"]
    assert reference["strict"]["count"] == 4
    assert reference["strict_difference"] is None
    assert reference["metrics"] is None
    assert worse["colour"] == worse["plain"]
    assert worse["plain"]["count"] == 2
    assert worse["strict_difference"]["mean"] == -0.5
    low, high = worse["strict_difference"]["interval"]
    assert low < -0.5 < high
    # Two of the latents differ by 1 in what else holds the seeds 5 to 8.
    norm = np.sqrt(sum(seed**2 for seed in range(5, 9)))
    assert worse["latent_difference"] == pytest.approx(np.sqrt(2) / norm, abs=1e-4)
    assert reference["strict_videos"] == "1111"
    assert worse["strict_videos"] == "0101"
    assert worse["speed"]["weights_bytes"] == 24
    assert "-50.0 points" in table(result)
    assert table(result) + "\n" == (tmp_path / "evaluation.md").read_text()

    calls, before = (
        (good.calls, bad.calls, good.decoded),
        (tmp_path / "evaluation.json").read_text(),
    )
    assert compare(tmp_path, good, bad) == result
    assert (good.calls, bad.calls, good.decoded) == calls
    assert (tmp_path / "evaluation.json").read_text() == before

    good.defaults = {**good.defaults, "steps": 26}  # Other settings: their own slices.
    compare(tmp_path, good, bad)
    assert (good.calls, bad.calls) == (2 * calls[0], calls[1])


def test_half_of_the_videos_being_equal_shows_in_the_measures(tmp_path):
    good, bad = Renderer(), Renderer(wrong=2)
    metrics = compare(tmp_path, good, bad)["variants"][1]["metrics"]
    drawn = [each.to_frames(each.sample_latents([], range(5, 9), 4), 4) for each in (bad, good)]
    expected = [psnr(*pair) for pair in zip(*drawn, strict=True)]
    assert expected.count(100.0) == 2
    assert metrics["psnr"]["mean"] == pytest.approx(np.mean(expected), abs=1e-4)  # As rounded.
    assert metrics["ssim"]["interval"][0] < metrics["ssim"]["mean"] < 1
    low, high = metrics["motion"]["interval"]
    assert low <= metrics["motion"]["mean"] <= high
    assert metrics["consistency"]["mean"] <= 1


def test_without_pixels_no_video_is_decoded_twice(tmp_path):
    config = {**CONFIG, "evaluate": {**CONFIG["evaluate"], "shown": 0, "pixels": False}}
    good, bad = Renderer(), Renderer(wrong=2)
    plain = compare(tmp_path, good, bad, config)["variants"][1]
    assert (good.decoded, bad.decoded) == (2, 2)
    assert plain["metrics"]["psnr"] is None
    assert plain["metrics"]["motion"] is not None
    whole = compare(tmp_path, good, bad)["variants"][1]  # Asked for later, it is not missing.
    assert whole["metrics"]["psnr"] is not None
    assert whole["strict_difference"] == plain["strict_difference"]
    assert whole["latent_difference"] == plain["latent_difference"]


def test_the_first_videos_of_every_variant_are_there_to_look_at(tmp_path):
    compare(tmp_path, Renderer(), Renderer(wrong=2))
    rows = json.loads((tmp_path / "evaluation" / "videos.json").read_text())
    assert [row["seed"] for row in rows] == [5, 6]
    for row in rows:
        assert list(row["videos"]) == ["Full precision", "Bad"]
        assert all((tmp_path / path).is_file() for path in row["videos"].values())
    assert len(list((tmp_path / "evaluation" / "videos").iterdir())) == 4


def test_more_videos_compute_only_those_that_are_new(tmp_path):
    good, bad = Renderer(), Renderer(wrong=2)
    compare(tmp_path, good, bad)
    more = {**CONFIG, "evaluate": {**CONFIG["evaluate"], "videos": 6}}
    assert compare(tmp_path, good, bad, more)["videos"] == 6
    assert (good.calls, bad.calls) == (3, 3)


def test_two_parts_together_are_one(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    good, bad = Renderer(), Renderer(wrong=2)
    whole = compare(tmp_path / "whole", good, bad)
    halves = [compare(tmp_path / "parts", good, bad, part=(i, 2)) for i in (0, 1)]
    assert halves[0] is None
    assert (good.calls, bad.calls) == (4, 4)
    assert without_times(halves[1]) == without_times(whole)


def test_an_interrupted_comparison_loses_one_batch_and_ends_in_the_same_file(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    good, bad = Renderer(), Renderer(wrong=2)
    whole = compare(tmp_path / "whole", good, bad)
    score, calls = answers.score, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(answers, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "resumed", good, bad)
    assert not (tmp_path / "resumed" / "evaluation.json").exists()
    resumed = compare(tmp_path / "resumed", good, bad)
    assert len(calls) == 5  # Two batches of two variants, one of them begun twice.
    assert without_times(resumed) == without_times(whole)


def without_times(result):
    """What does not depend on how long it took."""
    rows = [
        {key: value for key, value in row.items() if key not in ("speed", "seconds_per_video")}
        for row in result["variants"]
    ]
    return {**result, "variants": rows, "timing": ""}


def test_runs_that_share_a_reference_judge_full_precision_once(tmp_path):
    shared = {**CONFIG, "evaluate": {**CONFIG["evaluate"], "reference": str(tmp_path / "shared")}}
    good, rows = Renderer(), []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        rows.append(compare(tmp_path / run, good, Renderer(wrong=2), shared)["variants"])
    assert good.calls == 2
    assert rows[0][0] == rows[1][0]


def test_prompts_come_from_the_held_out_list_or_a_file(tmp_path):
    assert len(read_prompts("held_out", 3)) == 3
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\nthree\n")
    assert read_prompts(str(path), 2) == ["one", "two"]
    with pytest.raises(UserError, match=r"^sample.prompts=.*one prompt per line, or 'held_out'"):
        read_prompts(str(tmp_path / "nothing.txt"), 2)
