"""Which backend each layer of a model will use, why, and what speed to expect at best.

    python -m kernels.explain configs/wan14b_w4a4.py
    python -m kernels.explain configs/wan14b_w4a4.py --chip h200

No weights are needed, and no chip: without `--chip` the answer is for this machine's first device.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from configs import read_config
from kernels.chips import CHIPS, Chip, chip_of, named
from kernels.choose import BACKENDS, Choice, choose
from kernels.floor import least_seconds, preparing_seconds, unit_of
from kernels.operands import Product


class Row(NamedTuple):
    """One linear, in `count` layers: its product, its backend, and seconds at best.

    `seconds` and `bf16` are of all its layers; None where the chip's peaks are not known.
    """

    name: str
    count: int
    product: Product
    choice: Choice
    seconds: float | None
    bf16: float | None


def explain(
    layers: Sequence[tuple[str, int, Product]], chip: Chip, asked: str = "auto"
) -> list[Row]:
    """What `kernels.choose` answers for every layer, and the floors.

    Args:
        layers: name, number of layers, and product of each.
        chip: that they shall run on.
        asked: a backend, or "auto".
    """
    rows = []
    for name, count, product in layers:
        choice = choose(product, chip, asked)
        bytes_each = 0.5 if product.weight_bits <= 4 else 1.0
        unit = unit_of(choice.backend, product, chip)
        low = least_seconds(product, chip, unit, bytes_each)
        full = least_seconds(product, chip, "bf16", 2.0)
        times = (None, None) if low is None or full is None else (count * low, count * full)
        rows.append(Row(name, count, product, choice, *times))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text, and under them the reasons, each once."""
    lines = [
        f"{'layer':44s} {'':>4s} {'rows x in x out':>24s} {'backend':8s} {'ms':>9s} {'bf16':>9s}"
    ]
    notes: dict[tuple[str, str], int] = {}
    names = [row.name for row in rows]
    for row in rows:
        product, choice = row.product, row.choice
        note = notes.setdefault((choice.backend, choice.reason), len(notes) + 1)
        size = f"{product.rows} x {product.inner} x {product.columns}"
        times = " ".join(f"{_ms(x):>9s}" for x in (row.seconds, row.bf16))
        # Where blocks differ, a linear has a row for each of its bits.
        bits = f" W{product.weight_bits}A{product.act_bits}" if names.count(row.name) > 1 else ""
        name = f"{row.name + bits:44s} x{row.count:3d}"
        lines.append(f"{name} {size:>24s} {choice.backend:8s} {times} [{note}]")
    lines += [f"[{number}] {backend}: {reason}" for (backend, reason), number in notes.items()]
    return "\n".join(lines)


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1e3 * seconds:.3f}"


def ceiling(rows: Sequence[Row], attention_seconds: float | None, preparing: float = 0.0) -> str:
    """What linears at their floor give the whole transformer, beside attention in bf16.

    Args:
        rows: of `explain`.
        attention_seconds: in bf16; None where the chip's peaks are not known.
        preparing: seconds to smooth and rotate tokens before they are quantized.
    """
    if attention_seconds is None or any(row.seconds is None for row in rows):
        return "The peaks of this chip are not known: no floor. `python -m kernels.bench` measures."
    low, full = (sum(getattr(row, key) for row in rows) for key in ("seconds", "bf16"))
    low += preparing
    share = attention_seconds / (full + attention_seconds)
    whole = (full + attention_seconds) / (low + attention_seconds)
    of_them = f" ({1e3 * preparing:.1f} of them smoothing and rotation)" if preparing else ""
    return (
        f"Linears at best {1e3 * low:.1f} ms{of_them}, in bf16 {1e3 * full:.1f} ms: "
        f"{full / low:.2f}x. "
        f"Attention in bf16 {1e3 * attention_seconds:.1f} ms, {100 * share:.0f} % of the two: with "
        f"linears alone in low bits the transformer is at best {whole:.2f}x. All of it is computed "
        "from data-sheet peaks, nothing was timed."
    )


def read_quantized(argument: str) -> Mapping[str, Any]:
    """The config of `file.py[:argument]`, as plain dicts.

    This and `describe` are all in kernels/ that knows `qvgen_jax`: a command, like main.py.

    Raises:
        ValueError: see `configs.read_config`; or it is of no transformer that is quantized.
    """
    from qvgen_jax.quant.bits_file import with_bits_file

    config = read_config(argument).to_dict()
    if missing := [name for name in ("model", "data", "quant") if name not in config]:
        raise ValueError(
            f"the config of {argument!r} has no {', '.join(missing)}; name one that quantizes a "
            "transformer, such as configs/wan14b_w4a4.py"
        )
    return with_bits_file(config)


def describe(config: Mapping[str, Any], chip: Chip, asked: str | None = None) -> str:
    """The whole answer for a run's config.

    Args:
        config: of `read_quantized`.
        chip: that it is to run on.
        asked: a backend or "auto", instead of the config's own `kernels`.

    Raises:
        ValueError: the config names what does not exist, or QVGEN_ATTENTION nothing that runs.
    """
    from kernels.attention import choose_attention
    from kernels.attention_call import AttentionCall
    from qvgen_jax.models.linears import attended, quantized_products, video_tokens
    from qvgen_jax.models.published import transformer_config
    from qvgen_jax.training.student import quant_config

    model, data = transformer_config(config["model"]), config["data"]
    quant = quant_config(config["quant"], model)
    tokens = video_tokens(model, data["num_frames"], data["height"], data["width"])
    layers = quantized_products(model, tokens, data["max_length"], quant)
    rows = explain(layers, chip, asked or config.get("kernels", "auto"))
    preparing = 0.0
    for name, count, product in layers:
        block = quant.own_block_of(name, product.inner)
        if block > 1 or quant.smooths(name):
            preparing += count * (preparing_seconds(product, chip, block) or 0.0)
    pairs = attended(model, tokens, data["max_length"])
    operations = 4 * model.dim * model.num_layers * sum(q * k for q, k in pairs)
    seconds = operations / (chip.bf16 * 1e12) if chip.bf16 else None
    lines = [f"{config['model']}, {tokens} tokens of video, on {chip.name}", table(rows)]
    for queries, keys in pairs:
        heads, width = model.num_attention_heads, model.attention_head_dim
        call = AttentionCall(1, queries, keys, heads, width, jnp.dtype(jnp.bfloat16))
        try:
            name, reason = choose_attention(chip.platform, call)
        except NotImplementedError as refusal:  # Only where the environment asks for it.
            raise ValueError(f"QVGEN_ATTENTION: {refusal}") from refusal
        lines.append(f"attention of {queries} tokens to {keys}: {name} ({reason})")
    return "\n".join([*lines, ceiling(rows, seconds, preparing)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.explain",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("config", help="a file of configs/, file.py[:argument]")
    parser.add_argument("--chip", choices=tuple(CHIPS), help="instead of this machine's device")
    parser.add_argument(
        "--kernels", choices=("auto", *BACKENDS), help="instead of what the config says"
    )
    arguments = parser.parse_args(argv)
    chip = named(arguments.chip) if arguments.chip else chip_of(jax.devices()[0])
    try:
        print(describe(read_quantized(arguments.config), chip, arguments.kernels))
    except ValueError as error:  # A UserError is one.
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
