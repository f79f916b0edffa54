"""Writes the tokenizer of the tiny pipeline: whole words of its captions, and all of ASCII.

    python -m qvgen_jax.text.tiny_tokenizer assets/tiny_wan/tokenizer

It is a T5 tokenizer (Unigram over words that start with a low line, `<pad>` 0, `</s>` 1, `<unk>` 2)
with 126 pieces instead of UMT5's 256,384, in the files that transformers reads.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram

SPECIAL = ("<pad>", "</s>", "<unk>")

WORDS = (
    *("a", "moving", "on", "background"),
    *("circle", "square", "triangle", "cross", "star"),
    *("red", "green", "blue", "yellow", "magenta", "cyan"),
    *("right", "left", "up", "down", "up-right", "up-left", "down-right", "down-left"),
    *("slowly", "quickly"),
    *("black", "gray", "white"),
)

_SPACE = "\u2581"  # sentencepiece's mark for the start of a word
_WORD_SCORE, _CHARACTER_SCORE = -3.0, -10.0


def build(words: tuple[str, ...] = WORDS, max_length: int = 32) -> tuple[Tokenizer, dict]:
    """The tokenizer and the contents of its `tokenizer_config.json`."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = [(piece, 0.0) for piece in SPECIAL]
    pieces += [(_SPACE + word, _WORD_SCORE) for word in words]
    pieces += [(piece, _CHARACTER_SCORE) for piece in (_SPACE, *characters)]

    tokenizer = Tokenizer(Unigram(pieces, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    marks = {"replacement": _SPACE, "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**marks)]
    )
    tokenizer.decoder = decoders.Metaspace(**marks)
    end = SPECIAL.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,  # T5 otherwise appends 100 sentinel tokens.
        "additional_special_tokens": [],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return tokenizer, config


def save(folder: str | Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, config = build()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {name: config[name] for name in ("eos_token", "pad_token", "unk_token")}
    for name, contents in (("tokenizer_config", config), ("special_tokens_map", special)):
        (folder / f"{name}.json").write_text(json.dumps(contents, indent=2) + "\n")


if __name__ == "__main__":
    save(sys.argv[1])
