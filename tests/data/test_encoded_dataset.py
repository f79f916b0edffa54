"""Encoding and loading with a small pipeline in NumPy: what is tested is the way of the data."""

import itertools
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.data.clips import Cut, Size
from qvgen_jax.data.dataset import EncodedDataset, batches
from qvgen_jax.data.encode import encode_folder
from qvgen_jax.data.moving_shapes import write_folder
from qvgen_jax.data.prepare import ensure_encoded
from qvgen_jax.data.video import read_video, write_video
from qvgen_jax.errors import UserError

SIZE = {"num_frames": 5, "height": 32, "width": 48}
CUT = Cut((Size(5, 32, 48),), 0.0, 1, "centre")


class AveragingPipeline:
    """Latents are averages of 8 x 8 pixels of every fourth frame; text is one row per word."""

    def __init__(self, weight: float = 1.0):
        self.defaults = {"max_length": 12}
        self.vae = SimpleNamespace(config="averages", states=({"weight": jnp.full(3, weight)},))
        self.text_encoder = SimpleNamespace(config="words", states=({},))
        self.calls = 0

    def vae_posterior(self, video):
        self.calls += 1
        b, _, h, w, c = video.shape
        mean = video[:, ::4].reshape(b, -1, h // 8, 8, w // 8, 8, c).mean((3, 5))
        return jnp.asarray(mean), jnp.asarray(mean) - 8.0

    def encode_prompt(self, prompts, max_length):
        texts = np.zeros((len(prompts), max_length, 4), np.float32)
        for row, prompt in zip(texts, prompts, strict=True):
            for position, word in enumerate([*prompt.split(), "</s>"]):
                row[position] = len(word)
        return jnp.asarray(texts, jnp.bfloat16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_folder(folder, count=7, seed=0)
    return folder


@pytest.fixture(scope="module")
def encoded(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded")
    encode_folder(AveragingPipeline(), source, out, cut=CUT, shard_size=3, batch_size=2)
    return EncodedDataset(out)


def indices(stream, count):
    return [batch["caption"] for batch in itertools.islice(stream, count)]


def test_a_clip_comes_back_as_the_pipeline_made_it(source, encoded):
    assert len(encoded) == 7
    clip = encoded[4]
    assert clip["source"] == "00004.mp4"
    frames = read_video(source / "00004.mp4", cover=(32, 48))[:13:3]
    mean, logvar = AveragingPipeline().vae_posterior(frames[None] / np.float32(127.5) - 1)
    np.testing.assert_allclose(clip["latent_mean"], mean[0], atol=1e-6)
    np.testing.assert_allclose(clip["latent_logvar"], logvar[0], atol=1e-6)
    assert clip["text_embeds"].shape == (len(clip["caption"].split()) + 1, 4)
    assert clip["text_embeds"].dtype == jnp.bfloat16


def test_the_empty_prompt_is_padded_like_the_texts(encoded):
    empty = encoded.empty_text_embeds
    assert empty.shape == (12, 4)
    assert (empty[0] == 4).all()
    assert not empty[1:].any()
    longer = EncodedDataset(encoded.folder, max_length=20)
    assert longer.empty_text_embeds.shape == (20, 4)
    assert next(batches(longer, seed=0, batch_size=2))["text_embeds"].shape == (2, 20, 4)
    with pytest.raises(UserError, match="up to 12 tokens, max_length is 8"):
        EncodedDataset(encoded.folder, max_length=8)


def test_batches_hold_padded_texts_and_global_sample_numbers(encoded):
    first, second = itertools.islice(batches(encoded, seed=1, batch_size=3, captions=True), 2)
    assert first["latent_mean"].shape == (3, 2, 4, 6, 3)
    assert first["text_embeds"].shape == (3, 12, 4)
    assert first["sample_index"].tolist() == [0, 1, 2]
    assert second["sample_index"].tolist() == [3, 4, 5]
    assert second["sample_index"].dtype == np.int32
    words = len(first["caption"][0].split())
    assert first["text_embeds"][0, words].any()
    assert not first["text_embeds"][0, words + 1 :].any()


def test_resuming_at_a_step_gives_the_same_batches(encoded):
    whole = list(itertools.islice(batches(encoded, seed=5, batch_size=3), 8))
    resumed = batches(encoded, seed=5, batch_size=3, start_step=5)
    for expected, batch in zip(whole[5:], resumed, strict=False):
        for name, value in expected.items():
            np.testing.assert_array_equal(batch[name], value)


def test_every_epoch_is_a_new_order_of_all_clips_and_seeds_differ(encoded):
    stream = batches(encoded, seed=2, batch_size=7, captions=True)
    first, second = indices(stream, 2)
    assert sorted(first) == sorted(second) == sorted(encoded[i]["caption"] for i in range(7))
    assert first != second
    assert indices(batches(encoded, seed=3, batch_size=7, captions=True), 1)[0] != first


def test_two_processes_share_the_batch_that_one_would_get(encoded):
    alone = next(batches(encoded, seed=4, batch_size=4, start_step=2))
    shares = [
        next(batches(encoded, seed=4, batch_size=4, start_step=2, rows=rows))
        for rows in ([0, 2], [3, 1])
    ]
    numbers = np.concatenate([share["sample_index"] for share in shares])
    latents = np.concatenate([share["latent_mean"] for share in shares])
    order = np.argsort(numbers)
    np.testing.assert_array_equal(numbers[order], alone["sample_index"])
    np.testing.assert_array_equal(latents[order], alone["latent_mean"])
    with pytest.raises(ValueError, match="batch_size is 0, expected a positive number"):
        batches(encoded, seed=4, batch_size=0)


def test_a_batch_of_one_clip(encoded):  # grain's lengths overflowed.
    stream = batches(encoded, seed=0, batch_size=1)
    numbers = [batch["sample_index"].tolist() for batch in itertools.islice(stream, 3)]
    assert numbers == [[0], [1], [2]]


def test_a_batch_larger_than_the_data_set_wraps_around(encoded):
    batch = next(batches(encoded, seed=0, batch_size=10, captions=True))
    assert len(set(batch["caption"][:7])) == 7
    assert batch["sample_index"].tolist() == list(range(10))


def test_bad_videos_are_set_aside_with_their_reason_and_retried_when_replaced(tmp_path):
    source, out = tmp_path / "videos", tmp_path / "encoded"
    write_folder(source, count=3, seed=1)
    good = (source / "00001.mp4").read_bytes()
    (source / "00001.mp4").write_bytes(b"broken")
    write_video(source / "00002.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)
    lines = []
    manifest = encode_folder(AveragingPipeline(), source, out, cut=CUT, log=lines.append)
    assert manifest["count"] == 1
    assert "does not decode" in manifest["refused"]["00001.mp4"]
    assert "3 frames, needed are 5" in manifest["refused"]["00002.mp4"]
    assert any(line.startswith("set aside 00001.mp4") for line in lines)

    (source / "00001.mp4").write_bytes(good)
    manifest = encode_folder(AveragingPipeline(), source, out, cut=CUT)
    assert (manifest["count"], list(manifest["refused"])) == (2, ["00002.mp4"])
    assert len(EncodedDataset(out)) == 2


def run_config(source, most_refused: float) -> dict:
    data = {**SIZE, "source": source, "encoded": "", "max_length": 12, "encode_batch_size": 2}
    how = {"buckets": (), "fps": 0.0, "clips_per_video": 1, "crop": "centre", "on_the_fly": False}
    return {"model": "averages", "data": {**data, **how, "most_refused": most_refused}}


def test_a_run_goes_on_without_few_unusable_videos_and_stops_at_many(tmp_path, capsys):
    source = tmp_path / "videos"
    write_folder(source, count=3, seed=1)
    (source / "00001.mp4").write_bytes(b"broken")
    (source / "00002.mp4").unlink()
    pipe = AveragingPipeline()
    with pytest.raises(UserError, match=r"2 of 3 videos .*00001\.mp4 does not .*most_refused"):
        ensure_encoded(run_config(source, 0.5), tmp_path, pipe)
    calls = pipe.calls
    encoded = ensure_encoded(run_config(source, 0.7), tmp_path, pipe)
    assert len(EncodedDataset(encoded)) == 1
    assert pipe.calls == calls, "what was encoded before the message is kept"
    listed = [json.loads(line) for line in (encoded / "refused.jsonl").read_text().splitlines()]
    assert [row["file"] for row in listed] == ["00001.mp4", "00002.mp4"]
    assert "does not decode" in listed[0]["reason"]
    assert "set aside 00001.mp4: " in capsys.readouterr().out


def test_too_many_unusable_videos_stop_it_before_the_rest_is_encoded(tmp_path):
    source = tmp_path / "videos"
    write_folder(source, count=6, seed=1)
    for name in ("00000.mp4", "00001.mp4"):
        (source / name).write_bytes(b"broken")
    pipe, options = AveragingPipeline(), {"shard_size": 2, "most_refused": 0.2}
    with pytest.raises(UserError, match=r"2 of 6 videos cannot be used, or more"):
        encode_folder(pipe, source, tmp_path / "out", cut=CUT, **options)
    assert pipe.calls == 0


def test_a_video_that_is_mended_while_a_run_is_on_its_way_stays_set_aside(tmp_path):
    source = tmp_path / "videos"
    write_folder(source, count=3, seed=1)
    good = (source / "00001.mp4").read_bytes()
    (source / "00001.mp4").write_bytes(b"broken")
    ensure_encoded(run_config(source, 0.5), tmp_path, AveragingPipeline())
    (source / "00001.mp4").write_bytes(good)
    (tmp_path / "config.json").write_text("{}")  # As training claims its folder.
    encoded = ensure_encoded(run_config(source, 0.5), tmp_path, AveragingPipeline())
    assert len(EncodedDataset(encoded)) == 2
    (tmp_path / "config.json").unlink()
    encoded = ensure_encoded(run_config(source, 0.5), tmp_path, AveragingPipeline())
    assert len(EncodedDataset(encoded)) == 3


def test_no_usable_video_at_all_is_an_error_with_the_first_reason(tmp_path):
    source = tmp_path / "videos"
    write_folder(source, count=2, seed=1)
    (source / "00000.mp4").write_bytes(b"broken")
    (source / "00001.mp4").unlink()
    with pytest.raises(UserError, match=r"none of the 2 videos .*00000\.mp4 does not decode"):
        encode_folder(AveragingPipeline(), source, tmp_path / "encoded", cut=CUT)


def test_finished_shards_are_not_encoded_again(source, tmp_path):
    pipe = AveragingPipeline()
    options = {"cut": CUT, "shard_size": 3, "batch_size": 3}
    manifest = encode_folder(pipe, source, tmp_path, **options)
    assert pipe.calls == 3
    assert encode_folder(pipe, source, tmp_path, **options) == manifest
    assert pipe.calls == 3

    # As if it had been stopped in the middle of the second shard.
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "clips-00001.json").unlink()
    with pytest.raises(UserError, match="no finished encoding"):
        EncodedDataset(tmp_path)
    assert encode_folder(pipe, source, tmp_path, **options) == manifest
    assert pipe.calls == 4


def test_other_settings_or_other_weights_do_not_mix_with_finished_shards(source, tmp_path):
    encode_folder(AveragingPipeline(), source, tmp_path, cut=CUT)
    other = CUT._replace(sizes=(Size(9, 32, 48),), fps=8.0)
    with pytest.raises(UserError, match=r"5x32x48.* -> .*9x32x48.*fps .* -> 8.*delete that folder"):
        encode_folder(AveragingPipeline(), source, tmp_path, cut=other)
    with pytest.raises(UserError, match=r"other settings \(model"):
        encode_folder(AveragingPipeline(weight=2.0), source, tmp_path, cut=CUT)


def test_an_encoding_of_another_format_is_refused(encoded, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({**encoded.manifest, "format_version": 0}))
    with pytest.raises(UserError, match="format_version 0, this program reads 2"):
        EncodedDataset(tmp_path)


def test_scaling_covers_the_size_and_crops_the_centre(tmp_path):
    wide = np.zeros((2, 32, 96, 3), np.uint8)
    wide[:, :, 32:64] = 255
    write_video(tmp_path / "wide.mp4", wide, 8, crf=0)
    read = read_video(tmp_path / "wide.mp4", cover=(16, 16))
    assert read.shape == (2, 16, 16, 3)
    assert read[:, :, 2:-2].min() > 250
