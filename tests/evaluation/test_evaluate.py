"""The table's arithmetic, on videos whose verdict is known because the renderer drew them."""

from types import SimpleNamespace

import numpy as np
import pytest

from qvgen_jax.data.moving_shapes import COLOURS, caption, render
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation import evaluate
from qvgen_jax.evaluation.samples import read_prompts

CONFIG = {
    "evaluate": {"videos": 6, "seed": 5, "reference": ""},
    "sample": {"batch_size": 2},
}


NETWORK = SimpleNamespace(config="tiny", states=({"kernel": np.ones(3)},))


class Renderer:
    """Stands where a pipeline stands, and draws each prompt perfectly, or every `wrong`th badly."""

    def __init__(self, wrong: int = 0):
        self.wrong, self.calls = wrong, 0
        self.transformer = self.vae = self.text_encoder = NETWORK
        self.scheduler = "unipc"
        self.defaults = {"steps": 25, "guidance_scale": 2.5}
        self._by_caption = {caption(a): a for a in evaluate.held_out(360, 0)[0]}

    def sample_latents(self, prompts, seeds, batch_size):
        self.calls += 1
        self._asked = [self._by_caption[prompt] for prompt in prompts]
        return np.ones((len(prompts), 1, 2, 2, 1)) * (1 + bool(self.wrong))

    def to_frames(self, latents, batch_size):
        clips = []
        for index, wanted in enumerate(self._asked):
            if self.wrong and index % self.wrong == 0:
                other = next(colour for colour in COLOURS if colour != wanted.colour)
                wanted = wanted._replace(colour=other)
            clips.append(render(wanted, np.random.default_rng(index)))
        return np.stack(clips)


def test_the_table_counts_pairs_and_finished_slices_are_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_SLICE", 4)
    good, bad = Renderer(), Renderer(wrong=2)
    result = evaluate.evaluate_variants(CONFIG, tmp_path, {"Full precision": good, "Bad": bad})
    reference, worse = result["variants"]
    assert reference["strict"]["count"] == 6
    assert reference["strict_difference"] is None
    assert worse["colour"] == worse["plain"]
    assert worse["plain"]["count"] == 3
    assert worse["strict_difference"]["mean"] == -0.5
    low, high = worse["strict_difference"]["interval"]
    assert low < -0.5 < high
    assert worse["latent_difference"] == 1.0
    assert reference["strict_videos"] == "111111"
    assert worse["strict_videos"] == "010101"
    assert "-50.0 points" in evaluate.table(result)

    calls = good.calls, bad.calls
    again = evaluate.evaluate_variants(CONFIG, tmp_path, {"Full precision": good, "Bad": bad})
    assert (good.calls, bad.calls) == calls
    assert again["variants"] == result["variants"]

    good.defaults = {**good.defaults, "steps": 26}  # Other settings: their own slices.
    evaluate.evaluate_variants(CONFIG, tmp_path, {"Full precision": good, "Bad": bad})
    assert (good.calls, bad.calls) == (2 * calls[0], calls[1])


def test_runs_that_share_a_reference_judge_full_precision_once(tmp_path):
    shared = {**CONFIG, "evaluate": {**CONFIG["evaluate"], "reference": str(tmp_path / "shared")}}
    good, rows = Renderer(), []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        variants = {"Full precision": good, "Bad": Renderer(wrong=2)}
        rows.append(evaluate.evaluate_variants(shared, tmp_path / run, variants)["variants"])
    assert good.calls == 1
    assert rows[0][0] == rows[1][0]


def test_prompts_come_from_the_held_out_list_or_a_file(tmp_path):
    assert len(read_prompts("held_out", 3)) == 3
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\nthree\n")
    assert read_prompts(str(path), 2) == ["one", "two"]
    with pytest.raises(UserError, match="one prompt per line"):
        read_prompts(str(tmp_path / "nothing.txt"), 2)
