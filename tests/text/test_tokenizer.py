"""Prompts to ids: what each pipeline does, the tiny tokenizer, and sentencepiece folders."""

import contextlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from qvgen_jax.data import moving_shapes
from qvgen_jax.errors import UserError
from qvgen_jax.request import prompt_list
from qvgen_jax.text import tiny_tokenizer
from qvgen_jax.text.tokenizer import (
    COGVIDEOX_PROMPTS,
    clean_prompt,
    default_max_length,
    load_tokenizer,
    tokenize,
)

FOLDER = Path(__file__).parents[2] / "assets/tiny_wan/tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a   red\n\tcircle ", "a red circle"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("the cafÃ© \u201copens\u201d", 'the café "opens"'),
        ("a&nbsp;b", "a b"),
    ],
)
def test_prompts_are_repaired_as_wan_does(raw, clean):
    assert clean_prompt(raw) == clean


def test_every_caption_is_whole_words(tokenizer):
    words = {
        f"a {colour} {shape} moving {direction} {speed} on a {background} background"
        for colour, shape, direction, speed, background in itertools.product(
            moving_shapes.COLOURS,
            moving_shapes.SHAPES,
            moving_shapes.DIRECTIONS,
            moving_shapes.SPEEDS,
            moving_shapes.BACKGROUNDS,
        )
    }
    ids, mask = tokenize(tokenizer, sorted(words))
    assert ids.shape == (len(words), 32)
    assert ids.dtype == mask.dtype == np.int32
    assert set(mask.sum(1)) == {11}  # ten words and the end mark
    first_character = tokenizer.convert_tokens_to_ids("\u2581")
    assert ids.max() < first_character


def test_ids_are_padded_with_0_and_end_with_1(tokenizer):
    ids, mask = tokenize(tokenizer, ["a star", ""], max_length=5)
    star = tokenizer.convert_tokens_to_ids(["\u2581a", "\u2581star"])
    np.testing.assert_array_equal(ids, [[*star, 1, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def test_a_long_prompt_is_cut_and_keeps_its_end_mark(tokenizer):
    ids, mask = tokenize(tokenizer, ["red " * 100])
    assert ids.shape == (1, default_max_length(tokenizer)) == (1, 32)
    assert mask.all()
    assert ids[0, -1] == 1


def test_cogvideox_cuts_at_226_cleans_nothing_and_attends_its_padding(tokenizer):
    assert default_max_length(tokenizer, COGVIDEOX_PROMPTS) == 32  # the tokenizer's own limit
    ids, mask = tokenize(tokenizer, ["a &amp; b", ""], 226, COGVIDEOX_PROMPTS)
    assert ids.shape == mask.shape == (2, 226)
    assert mask.all()
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a &amp; b"
    np.testing.assert_array_equal(ids[1], [1] + [0] * 225)


def test_any_ascii_text_survives(tokenizer):
    text = "Hello, {World}! 5 * 7 ~ 35; up-"
    ids, mask = tokenize(tokenizer, [text], max_length=64)
    assert 2 not in ids
    assert tokenizer.decode(ids[0, : mask.sum()], skip_special_tokens=True) == text


def test_the_saved_files_are_what_the_script_writes(tmp_path):
    tiny_tokenizer.save(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert json.loads(path.read_text()) == json.loads((FOLDER / path.name).read_text())


def test_its_size_is_the_text_encoders_vocabulary(tokenizer):
    config = json.loads((FOLDER.parent / "text_encoder/config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]


@pytest.mark.parametrize("prompts", ["a red circle", [], [None]])
def test_prompts_must_be_a_list_of_strings(tokenizer, prompts):
    with pytest.raises(UserError, match="non-empty list of strings"):
        tokenize(tokenizer, prompts)


@pytest.fixture(scope="module")
def spiece_folder(tmp_path_factory):
    """A tokenizer as CogVideoX's: a sentencepiece model and its config, nothing else."""
    folder, model = tmp_path_factory.mktemp("spiece"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle moves", "the blue star, the red square"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 226}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "prompt", ["", "a red star", "  the\tred \n circle ", "Caf\u00e9 \u00bd, \ufb01"]
)
def test_a_sentencepiece_folder_gives_sentencepieces_ids(spiece_folder, prompt):
    ids, _ = tokenize(load_tokenizer(spiece_folder), [prompt], rule=COGVIDEOX_PROMPTS)
    model = sentencepiece.SentencePieceProcessor(model_file=str(spiece_folder / "spiece.model"))
    expected = [*model.encode(prompt), 1]
    np.testing.assert_array_equal(ids, [expected + [0] * (226 - len(expected))])


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: b"",
        lambda model: model[: len(model) // 2],
        lambda model: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 791656\n",
    ],
    ids=["empty", "cut", "pointer"],
)
def test_a_damaged_sentencepiece_model_is_refused(spiece_folder, tmp_path, damage):
    for path in spiece_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = tmp_path / "spiece.model"
    model.write_bytes(damage(model.read_bytes()))
    with pytest.raises(UserError, match="does not read as a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_without_its_parts_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5TokenizerFast"}')
    with pytest.raises(UserError, match="does not load as a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not load as a tokenizer"):
        load_tokenizer(tmp_path)


def test_code_that_a_folder_brings_along_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    for file in FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ran = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: ...\n")
    fields = json.loads((FOLDER / "tokenizer_config.json").read_text())
    fields |= {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    fields |= {"tokenizer_class": "Mine"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    with contextlib.suppress(UserError):
        load_tokenizer(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a \ud800", "is not Unicode text"), ("a" * 100_001, "has 100001 characters")],
)
def test_a_prompt_that_is_no_text_is_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        prompt_list(["fine", prompt])
