"""Clips encoded when a batch asks for them, beside those of an encoded folder."""

import itertools
import json

import jax
import numpy as np
import pytest

from configs import read_config
from qvgen_jax.data import live
from qvgen_jax.data.dataset import batches, steps_by_shape
from qvgen_jax.data.live import LiveDataset
from qvgen_jax.data.prepare import LIVE, check_source, read_dataset
from qvgen_jax.errors import UserError
from tests.data.test_buckets import CUT, encoded, videos  # noqa: F401
from tests.data.test_encoded_dataset import AveragingPipeline


@pytest.fixture
def alive(videos):  # noqa: F811
    return LiveDataset(AveragingPipeline(), videos, cut=CUT, max_length=12)


def test_batches_are_those_of_an_encoded_folder(alive, encoded):  # noqa: F811
    assert alive.buckets == encoded.buckets
    assert alive.refused == encoded.manifest["refused"]
    assert steps_by_shape(alive, 2) == steps_by_shape(encoded, 2)
    assert np.array_equal(alive.empty_text_embeds[:8], encoded.empty_text_embeds[:8])
    encoded.max_length = 12
    pairs = zip(*(batches(each, seed=3, batch_size=2) for each in (alive, encoded)), strict=True)
    for ours, theirs in itertools.islice(pairs, 20):  # Some come again: they were kept.
        for name in ("latent_mean", "latent_logvar", "text_embeds", "sample_index"):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_what_does_not_fit_in_memory_is_encoded_again(alive, monkeypatch):
    expected = [alive[index]["latent_mean"] for index in (0, 1)]
    monkeypatch.setattr(live, "_MOST_KEPT", 2 * expected[0].nbytes)
    calls, encode = [], alive._pipe.vae_posterior
    monkeypatch.setattr(alive._pipe, "vae_posterior", lambda x: calls.append(1) or encode(x))
    fresh = LiveDataset(alive._pipe, alive._folder, cut=CUT, max_length=12)
    for index in (0, 1, 0, 1):
        np.testing.assert_array_equal(fresh[index]["latent_mean"], expected[index])
    assert len(calls) == 3  # The first stays.


def test_too_many_unusable_videos_end_it(videos):  # noqa: F811
    arguments = {"cut": CUT, "max_length": 12, "most_refused": 0.05}
    with pytest.raises(UserError, match=r"1 of 10 videos cannot be used.*3 frames"):
        LiveDataset(AveragingPipeline(), videos, **arguments)


@pytest.fixture
def config(videos):  # noqa: F811
    config = read_config("configs/tiny_w4a4.py").to_dict()
    how = {"buckets": tuple(map(str, CUT.sizes)), "fps": CUT.fps, "clips_per_video": CUT.most}
    config["data"] |= how | {"source": str(videos), "on_the_fly": True, "crop": "random"}
    return config


def test_a_run_trains_on_videos_and_notes_only_which(config, tmp_path, videos):  # noqa: F811
    dataset = read_dataset(config, tmp_path, AveragingPipeline())
    assert len(next(batches(dataset, seed=0, batch_size=2))["latent_mean"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == [LIVE]
    read_dataset(config, tmp_path, AveragingPipeline())
    config["data"]["clips_per_video"] = 1  # As if the videos had become shorter.
    with pytest.raises(UserError, match=r"give other clips than those that .* began with"):
        read_dataset(config, tmp_path, AveragingPipeline())


def test_a_folder_for_clips_or_a_second_device_is_refused(config, tmp_path, monkeypatch):
    check_source(config, tmp_path)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(UserError, match="for a run on one device, here are 2"):
        check_source(config, tmp_path)
    config["data"]["encoded"] = "clips"
    with pytest.raises(UserError, match=r"encodes nothing beforehand, but data\.encoded='clips'"):
        check_source(config, tmp_path)


def test_that_no_video_can_be_used_is_told(tmp_path):
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "a.mp4", "caption": "a"}))
    with pytest.raises(UserError, match=r"none of the 1 videos can be used: .*a\.mp4"):
        LiveDataset(AveragingPipeline(), tmp_path, cut=CUT, max_length=12)
