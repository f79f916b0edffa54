"""What a run measures of its teacher before step 0: what smoothing and learned steps start from.

A function of the config's seed, the data and the teacher. Only step 0 needs it; a checkpoint holds
what came of it.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from qvgen_jax import sharding
from qvgen_jax.data.dataset import EncodedDataset
from qvgen_jax.diffusion.noising import training_noise
from qvgen_jax.diffusion.schedulers import Scheduler
from qvgen_jax.models import TransformerConfig, build_transformer, quantizable
from qvgen_jax.quant.calibration import MAXIMA, MEANS, Measure, Probe, observing
from qvgen_jax.quant.named import layer_at
from qvgen_jax.training.feed import feed
from qvgen_jax.training.step import fill_patches, in_parts, noisy_inputs, sample_keys
from qvgen_jax.training.student import quant_config

BATCHES = 4

# A measure of a linear's tokens, and how those of several batches combine.
LARGEST = (MAXIMA, jnp.max)
MEAN = (MEANS, jnp.mean)


def activation_maxima(
    config: Mapping,
    model: TransformerConfig,
    scheduler: Scheduler,
    teacher: dict,
    dataset: EncodedDataset,
    mesh: Mesh | None = None,
) -> dict[str, jax.Array] | None:
    """The teacher's largest activations over what the first steps of the run will train on.

    Returns:
        The name of each quantized linear to the largest magnitude of each of its input channels,
        float32 `[in]` or `[layers, in]`; None if the run does not smooth.
    """
    if not quant_config(config["quant"], model).smoothing:
        return None
    return _measured(config, model, scheduler, teacher, dataset, mesh, LARGEST)


def activation_moments(
    config: Mapping,
    model: TransformerConfig,
    scheduler: Scheduler,
    teacher: dict,
    dataset: EncodedDataset,
    mesh: Mesh | None = None,
) -> dict[str, jax.Array] | None:
    """The teacher's mean activations over what the first steps of the run will train on.

    Returns:
        The name of each quantized linear to the means of |x|, x and x^2 over what it reads, float32
        `[3]` or `[layers, 3]`; None if the run learns no steps of activations.
    """
    if not quant_config(config["quant"], model).learned_steps:
        return None
    return _measured(config, model, scheduler, teacher, dataset, mesh, MEAN)


def _measured(
    config: Mapping,
    model: TransformerConfig,
    scheduler: Scheduler,
    teacher: dict,
    dataset: EncodedDataset,
    mesh: Mesh | None,
    wanted: tuple[Measure, Callable],
) -> dict[str, jax.Array]:
    """A measure of every quantized linear's tokens, and how those of batches combine."""
    measure = jax.jit(measuring_step(config, model, scheduler, wanted))
    data, empty_text = feed(dataset, config, mesh=mesh), jnp.asarray(dataset.empty_text_embeds)
    if mesh is not None:
        empty_text = jax.device_put(empty_text, sharding.whole(mesh))
    found = [measure(teacher, next(data), empty_text, jnp.int32(step)) for step in range(BATCHES)]
    return jax.tree.map(lambda *each: wanted[1](jnp.stack(each), axis=0), *found)


def measuring_step(
    config: Mapping,
    model: TransformerConfig,
    scheduler: Scheduler,
    wanted: tuple[Measure, Callable] = LARGEST,
) -> Callable[[dict, dict, jax.Array, jax.Array], dict]:
    """What one batch of the run says: of the teacher, the batch, the empty prompt and the step.

    Args:
        config, model, scheduler: of the run.
        wanted: a measure of tokens, and how those of parts of a batch combine.

    Returns:
        A function to be jitted; it returns the name of each quantized linear to its measure.
    """
    measure_of_tokens, combine = wanted
    quant, train = quant_config(config["quant"], model), config["train"]
    names, dtype = quant.quantized(quantizable(model)), jnp.dtype(config["compute_dtype"])
    dense = observing(names, {"probe": measure_of_tokens})
    network = nnx.eval_shape(
        lambda: build_transformer(
            model, key=jax.random.key(0), dense=dense, dtype=dtype, remat="blocks"
        )
    )
    graphdef, _, probes = nnx.split(network, nnx.Param, Probe)
    probes = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), nnx.to_pure_dict(probes))
    noising = training_noise(scheduler, train)

    def measure(teacher: dict, batch: dict, empty_text: jax.Array, step: jax.Array) -> dict:
        keys = sample_keys(config["seed"], step, batch["sample_index"])
        filled = fill_patches(batch, model.patch_size[0])
        inputs = noisy_inputs(filled, keys, noising, train["caption_dropout"], empty_text)

        def of_part(part: tuple) -> dict:
            def total(probes: dict) -> jax.Array:
                y = nnx.merge(graphdef, teacher, probes)(*part)
                return jnp.sum(y.astype(jnp.float32))

            found = jax.grad(total)(probes)
            return {name: layer_at(found, name)["probe"] for name in names}

        # As many samples at once as a training step holds.
        seen = (inputs["latents"], inputs["timesteps"], inputs["text_embeds"])
        parts = jax.tree.map(lambda x: in_parts(x, train["accumulate"]), seen)
        return jax.tree.map(lambda x: combine(x, axis=0), jax.lax.map(of_part, parts))

    return measure


def unmeasured(model: TransformerConfig, teacher: dict) -> dict[str, jax.Array]:
    """Ones in the shapes of `activation_maxima`, for states that are only described."""
    shapes = {name: layer_at(teacher, name)["kernel"].shape[:-1] for name in quantizable(model)}
    return {name: jnp.ones(shape, jnp.float32) for name, shape in shapes.items()}


def unmeasured_moments(model: TransformerConfig, teacher: dict) -> dict[str, jax.Array]:
    """The same in the shapes of `activation_moments`."""
    of_maxima = unmeasured(model, teacher)
    return {name: jnp.ones((*ones.shape[:-1], 3), jnp.float32) for name, ones in of_maxima.items()}
