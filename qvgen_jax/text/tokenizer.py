"""Prompts to token ids, as Wan's pipeline prepares them (diffusers, `pipeline_wan.py`)."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np

from qvgen_jax.errors import UserError

_WAN_MAX_LENGTH = 512


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer saved in `folder`.

    Raises:
        UserError: the folder is missing or holds no tokenizer.
    """
    from transformers import AutoTokenizer  # Importing it takes seconds; most of us never tokenize.

    if not Path(folder).is_dir():
        raise UserError(f"no tokenizer folder at {folder}: a pipeline folder holds `tokenizer/`")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} does not load as a tokenizer ({error}): expected tokenizer.json or "
            "spiece.model, and tokenizer_config.json, as transformers saves them"
        ) from error


def default_max_length(tokenizer: Any) -> int:
    """Wan's 512 tokens, or fewer where the tokenizer says so."""
    return min(tokenizer.model_max_length, _WAN_MAX_LENGTH)


def clean_prompt(prompt: str) -> str:
    """Broken Unicode and HTML entities repaired (twice escaped ones too), white space collapsed."""
    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", prompt).strip()


def tokenize(
    tokenizer: Any, prompts: Sequence[str], max_length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cleaned, tokenized, cut and padded prompts.

    Args:
        max_length: tokens per prompt including the end mark; `default_max_length` if None.

    Returns:
        ids and mask, both int32 `[len(prompts), max_length]`.

    Raises:
        UserError: a prompt is not a string, or there is none.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"prompts = {prompts!r}: expected a non-empty list of strings")
    encoded = tokenizer(
        [clean_prompt(prompt) for prompt in prompts],
        padding="max_length",
        max_length=default_max_length(tokenizer) if max_length is None else max_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="np",
    )
    return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(np.int32)
