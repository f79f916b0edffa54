"""Prompts to token ids, as the pipelines of Wan and CogVideoX prepare them (diffusers)."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy
import numpy as np

from qvgen_jax.errors import UserError


@dataclass(frozen=True)
class PromptRule:
    """What a pipeline does with a prompt before its text encoder.

    Attributes:
        max_length: tokens per prompt, including the end mark.
        cleaned: repaired by `clean_prompt` first.
        attends_padding: PyTorch's CogVideoX gives no mask to its encoder, nor to its transformer:
            the embeddings of padding are read like any other, and never set to zero.
    """

    max_length: int
    cleaned: bool
    attends_padding: bool


WAN_PROMPTS = PromptRule(512, cleaned=True, attends_padding=False)
COGVIDEOX_PROMPTS = PromptRule(226, cleaned=False, attends_padding=True)


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer saved in `folder`, as `tokenizer.json` or as `spiece.model`.

    Raises:
        UserError: the folder is missing or holds no tokenizer, or one that is damaged.
    """
    from transformers import AutoTokenizer  # Importing it takes seconds; most of us never tokenize.

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no tokenizer folder at {folder}: a pipeline folder holds `tokenizer/`")
    if not (folder / "tokenizer.json").exists():
        _check_spiece(folder / "spiece.model")
    try:
        # Without the last, transformers asks whether to run code that a folder brings along.
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # JSON, keys, missing packages: its errors have no common base.
        raise UserError(
            f"{folder} does not load as a tokenizer ({type(error).__name__}: {error}): expected "
            "tokenizer.json or spiece.model, and tokenizer_config.json, as transformers saves them"
        ) from error


def _check_spiece(path: Path) -> None:
    """transformers makes of a missing or empty model a tokenizer that knows no word, silently."""
    import sentencepiece

    if not path.exists():
        raise UserError(
            f"{path.parent} does not load as a tokenizer: it holds neither tokenizer.json nor "
            "spiece.model; fetch the folder again"
        )
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    except (OSError, RuntimeError) as error:
        pieces, reason = 0, str(error).splitlines()[0]
    else:
        reason = "no pieces"
    if not pieces:
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) does not read as a sentencepiece model "
            f"({reason}); fetch it again, as the file itself, not a Git LFS pointer"
        )


def default_max_length(tokenizer: Any, rule: PromptRule = WAN_PROMPTS) -> int:
    """The pipeline's number of tokens, or fewer where the tokenizer says so."""
    return min(tokenizer.model_max_length, rule.max_length)


def clean_prompt(prompt: str) -> str:
    """Broken Unicode and HTML entities repaired (twice escaped ones too), white space collapsed."""
    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", prompt).strip()


def tokenize(
    tokenizer: Any,
    prompts: Sequence[str],
    max_length: int | None = None,
    rule: PromptRule = WAN_PROMPTS,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenized, cut and padded prompts.

    Args:
        max_length: tokens per prompt including the end mark; `default_max_length` if None.
        rule: of the pipeline that the prompts are for.

    Returns:
        ids and mask, both int32 `[len(prompts), max_length]`; the mask is 1 where a token is to be
        attended.

    Raises:
        UserError: a prompt is not a string, or there is none.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"prompts = {prompts!r}: expected a non-empty list of strings")
    encoded = tokenizer(
        [clean_prompt(prompt) if rule.cleaned else prompt for prompt in prompts],
        padding="max_length",
        max_length=default_max_length(tokenizer, rule) if max_length is None else max_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="np",
    )
    ids, mask = (encoded[name].astype(np.int32) for name in ("input_ids", "attention_mask"))
    return ids, np.ones_like(mask) if rule.attends_padding else mask
