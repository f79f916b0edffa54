"""Loading over four devices; `tests/test_placement.py` runs these where there are four."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import qvgen_jax
from convert import load as convert_load
from convert.array_tree import restore_params
from convert.export import export_pipeline
from convert.to_arrays import import_pipeline
from kernels.partition import automatic_axes, over_rows
from qvgen_jax.errors import UserError
from qvgen_jax.models import abstract_params, quantizable
from qvgen_jax.placement import automatic, run_where
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.initialize import round_to_nearest
from qvgen_jax.training.run import load_model

SOURCE = Path(__file__).parents[1] / "assets" / "tiny_wan"
KINDS = ("safetensors", "imported", "packed")
PROMPTS = ["a red star moving up slowly", "a green disk"] * 2


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 2), ("rows", "columns"))


@pytest.fixture(scope="module")
def cut(mesh):
    """Matrices in two by two slices where they divide, everything else whole."""

    def one(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [None] * leaf.ndim
        if leaf.ndim > 1 and leaf.shape[-1] % 2 == leaf.shape[-2] % 2 == 0:
            axes[-2:] = ["rows", "columns"]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return lambda params: jax.tree.map(one, params)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    import_pipeline(SOURCE, root / "imported")
    pipe, quant = qvgen_jax.load(SOURCE), QuantConfig(4, 8, rank=0)
    model = pipe.transformer.config
    params, _ = round_to_nearest(pipe.transformer.states[0], quantizable(model), quant)
    export_pipeline(SOURCE, root / "packed", model, params, quant)
    return {"safetensors": SOURCE, **{kind: root / kind for kind in KINDS[1:]}}


@pytest.fixture(scope="module")
def whole(folders) -> dict[str, qvgen_jax.pipeline.Pipeline]:
    """Every folder on one device."""
    return {kind: qvgen_jax.load(folder) for kind, folder in folders.items()}


def assert_placed(params: dict, shardings: dict, expected: dict) -> None:
    def check(leaf, sharding, plain):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        slices = {shard.data.shape for shard in leaf.addressable_shards}
        assert slices == {sharding.shard_shape(leaf.shape)}
        assert leaf.dtype == plain.dtype
        np.testing.assert_array_equal(leaf, plain)

    jax.tree.map(check, params, shardings, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_device_holds_its_slices_whatever_the_folder(folders, whole, cut, mesh, kind):
    expected = whole[kind].transformer.states[0]
    for over in (None, mesh):
        params = qvgen_jax.load(folders[kind], mesh=over, shardings=cut).transformer.states[0]
        assert_placed(params, cut(expected), expected)
        leaf = params["blocks"]["ffn"]["up"]["codes" if kind == "packed" else "kernel"]
        rows = 64 if kind == "packed" else 128  # On a CPU two codes share a byte.
        assert leaf.shape == (6, rows, 512)
        assert leaf.addressable_shards[0].data.shape == (6, rows // 2, 256)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_shardings_may_be_a_tree_like_the_abstract_parameters(folders, whole, cut, kind):
    tree = cut(abstract_params(SOURCE / "transformer" / "config.json"))
    params = qvgen_jax.load(folders[kind], "bfloat16", shardings=tree).transformer.states[0]
    expected = qvgen_jax.load(folders[kind], "bfloat16").transformer.states[0]
    assert_placed(params, tree, expected)
    assert params["blocks"]["ffn"]["up"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("kind", "over_mesh"),
    [("safetensors", False), ("safetensors", True), ("imported", True), ("packed", False)],
)
def test_videos_do_not_depend_on_the_shardings(folders, whole, cut, mesh, kind, over_mesh):
    request = {"prompts": PROMPTS, "steps": 3, "seeds": [5, 6, 7, 8], "guidance_scale": 1.0}
    expected = whole[kind].sample_latents(**request)
    # Sums over slices are added up in another order. In a packed transformer that rounds single
    # activations to the next code, and ends where noise changed by 1e-7 does: 3 % away.
    most = 0.1 if kind == "packed" else 1e-5
    pipe = qvgen_jax.load(folders[kind], mesh=mesh if over_mesh else None, shardings=cut)
    for video, plain in zip(pipe.sample_latents(**request), expected, strict=True):
        assert np.linalg.norm(video - plain) < most * np.linalg.norm(plain)


def test_a_mesh_alone_restores_an_import_onto_all_its_devices(folders, whole, mesh, monkeypatch):
    restore, asked = convert_load.array_tree.restore_params, []

    def spied(folder, like):
        asked.extend(leaf.sharding for leaf in jax.tree.leaves(like))
        return restore(folder, like)

    monkeypatch.setattr(convert_load.array_tree, "restore_params", spied)
    params = qvgen_jax.load(folders["imported"], mesh=mesh).transformer.states[0]
    everywhere = NamedSharding(mesh, PartitionSpec())
    assert asked
    assert all(sharding.is_equivalent_to(everywhere, 1) for sharding in asked)
    shardings = jax.tree.map(lambda leaf: everywhere, params)
    assert_placed(params, shardings, whole["imported"].transformer.states[0])


def test_another_transformer_keeps_its_slices_and_comes_whole_without(folders, cut, mesh):
    pipe = qvgen_jax.load(SOURCE, mesh=mesh, shardings=cut)
    params = jax.tree.map(lambda leaf: -leaf, pipe.transformer.states[0])
    kept = pipe.with_transformer(pipe.transformer.graphdef, params).transformer.states[0]
    assert_placed(kept, cut(params), params)
    host = jax.tree.map(np.asarray, params)
    placed = pipe.with_transformer(pipe.transformer.graphdef, host).transformer.states[0]
    assert_placed(placed, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), host), host)


def test_the_trainer_passes_shardings_on(folders, whole, cut):
    config = {"model": str(folders["imported"]), "text_weights": "float"}
    params = load_model(config, cut).transformer.states[0]
    assert_placed(params, cut(params), whole["imported"].transformer.states[0])


def test_shardings_of_other_devices_than_the_mesh_are_refused(cut, mesh):
    turned = Mesh(mesh.devices[::-1], mesh.axis_names)
    with pytest.raises(UserError, match=r"\[0, 1, 2, 3\] and \[2, 3, 0, 1\].*from one mesh"):
        qvgen_jax.load(SOURCE, mesh=turned, shardings=cut)
    here = SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(UserError, match=r"\[0, 1, 2, 3\] and \[0\].*from one mesh"):
        qvgen_jax.load(SOURCE, mesh=mesh, shardings=here)


@pytest.fixture(scope="module")
def thirds() -> NamedSharding:
    """Of the leading axis: the six layers of the blocks divide, 128 outside of them does not."""
    return NamedSharding(Mesh(np.array(jax.devices()[:3]), ("thirds",)), PartitionSpec("thirds"))


@pytest.mark.parametrize("kind", KINDS)
def test_shardings_that_do_not_divide_are_refused(folders, thirds, kind):
    first = r"parts: condition_embedder\.text_embedder\.linear_1\.bias \[128\] by .*'thirds': 3"
    with pytest.raises(UserError, match=first):
        qvgen_jax.load(folders[kind], shardings=thirds)


def test_restoring_refuses_them_without_calling_the_import_damaged(folders, thirds):
    shapes = abstract_params(SOURCE / "transformer" / "config.json")
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=thirds), shapes
    )
    with pytest.raises(UserError, match="unequal parts: condition_embedder"):
        restore_params(folders["imported"] / "transformer", like)


# orbax drops the other reads at the first error, which the interpreter tells about each.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_told_where_shardings_are_given_too(folders, cut, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders["imported"], copy)
    largest = max((copy / "transformer/arrays/d").iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 255
    largest.write_bytes(content)
    with pytest.raises(UserError, match=r"incomplete or damaged .*import the model again"):
        qvgen_jax.load(copy, shardings=cut)


@pytest.mark.parametrize("rows", [1, 32, 37])
def test_rows_of_a_kernel_go_over_all_devices(rows, mesh):
    x = jnp.arange(rows * 5.0).reshape(rows, 5)
    weight, calls = jnp.arange(15.0).reshape(5, 3), []

    def kernel(x, weight):
        calls.append(x.shape)
        return x @ weight

    assert len(jax.devices()) == 4
    with jax.set_mesh(automatic(mesh)):
        y = jax.jit(lambda x: over_rows(kernel, x, weight))(x)
    np.testing.assert_array_equal(y, x @ weight)
    assert calls == [(8 if rows < 33 else 16, 5)]


def test_a_kernel_needs_a_mesh_that_says_where_it_runs(folders, whole):
    with pytest.raises(NotImplementedError, match="4 devices and no mesh"):
        over_rows(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 1)))
    assert run_where(lambda _: automatic_axes(), whole["packed"].transformer.states) == {
        "device": 1
    }
