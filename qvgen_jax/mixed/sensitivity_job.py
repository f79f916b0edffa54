"""`--job sensitivity`: a run's config to `sensitivity.json`, a heat map and a table."""

import math
from collections.abc import Mapping
from pathlib import Path

import jax

from kernels.chips import chip_of
from qvgen_jax.mixed.candidates import parse_candidates
from qvgen_jax.mixed.figure import draw_heat_map
from qvgen_jax.mixed.inputs import Probed, check_probe, left_out, read_probed
from qvgen_jax.mixed.scan import layer_targets, scan
from qvgen_jax.mixed.sensitivity import NAME, Sensitivity, as_table, begun
from qvgen_jax.training.check import check_config
from qvgen_jax.training.lock import alone_in
from qvgen_jax.training.operations import forward_products

FIGURE = "sensitivity.png"


def run_sensitivity(
    config: Mapping, workdir: Path, candidates: str, timesteps: int, clips: int
) -> str:
    """Scans, or goes on with a scan; the table as text.

    Args:
        config: of a training run, plain dicts; its bits are not read.
        workdir: where the scan lives.
        candidates: see `parse_candidates`.
        timesteps: how many of the sampler's.
        clips: how many.

    Raises:
        UserError: a wrong config, or a workdir with a scan of something else.
    """
    check_config(config)
    asked = parse_candidates(candidates)
    check_probe(config, workdir, "sensitivity")
    with alone_in(workdir):
        probed = read_probed(config, workdir, clips, timesteps)
        layers = layer_targets(probed.probe.names, probed.model.num_layers)
        found = begun(workdir / NAME, probed.asked, asked, tuple(layers))
        if found.missing:
            print(_cost(found, probed), flush=True)
        how = (probed.teacher, probed.quant, probed.model.num_layers, probed.activations)
        found = scan(found, workdir / NAME, probed.probe, *how)
        draw_heat_map(workdir / FIGURE, found)
    files = f"{workdir / NAME}, {workdir / FIGURE}"
    return "\n".join([as_table(found), *left_out(probed.quant), files])


def _cost(found: Sensitivity, probed: Probed) -> str:
    """What is still to do, in forwards of one clip, and in hours at the chip's peak."""
    model, latents, text = probed.model, *(probed.probe.samples.calls[0][i] for i in (0, 2))
    sizes = zip(latents.shape[1:4], model.patch_size, strict=True)
    tokens = math.prod(size // patch for size, patch in sizes)
    samples = probed.probe.samples
    forwards = found.missing * samples.clips * len(samples.timesteps)
    each = 2 * sum(product.count for product in forward_products(model, tokens, text.shape[1]))
    said = (
        f"sensitivity: {found.missing} measurements ({len(found.layers)} layers, "
        f"{', '.join(c.name for c in found.candidates)}) of {samples.clips} clips at "
        f"{len(samples.timesteps)} timesteps: {forwards} forwards of one clip, "
        f"{forwards * each:.2g} operations"
    )
    chip = chip_of(jax.devices()[0])
    if not chip.bf16:
        return said
    hours = forwards * each / (chip.bf16 * 1e12) / 3600
    return (
        f"{said}, {hours:.2g} hours or more at the peak of {chip.name}; fewer by --candidates, "
        "--timesteps and --clips"
    )
