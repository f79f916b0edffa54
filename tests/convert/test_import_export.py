"""Import and export: values, files, shardings, interruptions, and what travels along."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert import array_tree
from convert.array_tree import chunk_shape, open_leaf
from convert.load import read_transformer
from convert.to_arrays import import_pipeline
from convert.to_safetensors import export_safetensors
from qvgen_jax.errors import UserError
from tests.convert.pipelines import FILES, file_bytes, random_tensors, write_pipeline

ROOT = Path(__file__).parents[2]


def params_of(folder: Path, dtype=jnp.float32) -> dict:
    return read_transformer(folder / "transformer", dtype).states[0]


def assert_same(one: dict, other: dict) -> None:
    def check(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(check, one, other)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_gives_back_every_file_of_the_source_byte_for_byte(tmp_path, dtype, files):
    source = write_pipeline(tmp_path / "source", random_tensors(dtype), files)
    done = import_pipeline(source, tmp_path / "imported")
    export_safetensors(tmp_path / "imported", tmp_path / "back")
    assert done.converted == done.tensors == len(random_tensors(dtype))
    assert file_bytes(tmp_path / "back") == file_bytes(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "imported", "source"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_import_loads_as_its_source_does(source, imported, dtype):
    assert_same(params_of(imported, dtype), params_of(source, dtype))


def test_orbax_restores_the_arrays_by_itself(source, imported):
    path = imported.resolve() / "transformer" / "arrays"
    expected = params_of(source)
    assert_same(ocp.StandardCheckpointer().restore(path), expected)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), expected)
    restored = ocp.StandardCheckpointer().restore(path, like)
    assert_same(restored, expected)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


SHARDED = """
    import sys
    from pathlib import Path
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from convert.load import read_transformer

    source, imported = (Path(word) / "transformer" for word in sys.argv[1:])
    expected = read_transformer(source, jnp.bfloat16).states[0]
    mesh = jax.make_mesh((2, 3), ("a", "b"))

    def spread(leaf):
        axes = [next((name for name, n in (("b", 3), ("a", 2)) if size % n == 0), None)
                for size in leaf.shape]
        axes = [name if name not in axes[:i] else None for i, name in enumerate(axes)]
        return NamedSharding(mesh, PartitionSpec(*axes))

    for shardings in (jax.tree.map(spread, expected), NamedSharding(mesh, PartitionSpec())):
        params = read_transformer(imported, jnp.bfloat16, shardings).states[0]
        wanted = jax.tree.broadcast(shardings, expected)
        jax.tree.map(lambda a, b, s: np.testing.assert_array_equal(a, np.asarray(b)) or (
            b.sharding == s or sys.exit(f"{b.sharding} is not {s}")), expected, params, wanted)
    print(params["blocks"]["ffn"]["up"]["kernel"].sharding.num_devices)
"""


def test_an_import_is_restored_straight_into_any_sharding(source, imported):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=6", "JAX_PLATFORMS": "cpu"}
    code, folders = textwrap.dedent(SHARDED), [str(source), str(imported)]
    done = subprocess.run(
        [sys.executable, "-c", code, *folders],
        cwd=ROOT,
        env=os.environ | flags | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "6", done.stderr


def test_chunks_hold_one_layer_and_split_what_a_mesh_splits(imported):
    assert chunk_shape((40, 5120, 13824), 4, True) == (1, 640, 864)
    assert chunk_shape((40, 5120, 5120), 2, True) == (1, 1280, 1280)
    assert chunk_shape((40, 5120), 4, True) == (1, 5120)
    assert chunk_shape((5120, 64), 4, False) == (5120, 64)
    arrays = imported / "transformer" / "arrays"
    store = open_leaf(arrays, "blocks.ffn.up.kernel")
    assert store.chunk_layout.read_chunk.shape == (1, 24, 35)
    # 90 chunks and 30 descriptions, but one write.
    assert len(list((arrays / "d").iterdir())) <= 4


KILLED = """
    import os, signal, sys
    from convert import plan, progress
    from convert.to_arrays import import_pipeline

    record, count = progress.add, 0

    def killed(partial, done):
        global count
        count += 1
        if count == 6:  # Written, but not yet on record.
            with (partial / "progress.jsonl").open("a") as file:
                file.write('{"blocks.0.norm2.wei')
            os.kill(os.getpid(), signal.SIGKILL)
        record(partial, done)

    plan._BATCH_BYTES, progress.add = 4000, killed
    import_pipeline(*sys.argv[1:])
"""


def test_a_killed_import_continues_where_it_was(tmp_path, source, imported):
    target = tmp_path / "target"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(source), str(target)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    lines = (tmp_path / "target.partial" / "progress.jsonl").read_text().split("\n")
    on_record = sum(len(json.loads(line)) for line in lines[1:-1])
    assert 0 < on_record < 96
    done = import_pipeline(source, target)
    assert done.converted == 96 - on_record
    assert_same(params_of(target), params_of(imported))
    assert (target / "transformer" / array_tree.MANIFEST).read_bytes() == (
        imported / "transformer" / array_tree.MANIFEST
    ).read_bytes()


def full_disk(*args):
    raise OSError("No space left on device")


def test_an_unfinished_import_of_another_source_is_not_continued(tmp_path, tensors, monkeypatch):
    source, target = write_pipeline(tmp_path / "source", tensors), tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr("convert.progress.add", full_disk)
        with pytest.raises(OSError, match="No space"):
            import_pipeline(source, target)
    write_pipeline(source, tensors | {"proj_out.bias": -tensors["proj_out.bias"]})
    with pytest.raises(UserError, match="its source has changed since"):
        import_pipeline(source, target)


@pytest.mark.parametrize("content", [b"", b"no json\n", b"\xff\xfe\n", b"[]\n", b"7\n"])
def test_a_record_that_is_not_ours_is_left_alone(tmp_path, source, content):
    partial = tmp_path / "target.partial"
    partial.mkdir()
    (partial / "progress.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="another conversion left unfinished"):
        import_pipeline(source, tmp_path / "target")
    assert (partial / "progress.jsonl").read_bytes() == content


def test_damaged_last_lines_of_a_record_are_done_again(tmp_path, source, monkeypatch):
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr("convert.progress.add", full_disk)
        with pytest.raises(OSError, match="No space"):
            import_pipeline(source, target)
    with (tmp_path / "target.partial" / "progress.jsonl").open("ab") as file:
        file.write(b'{"nothing of ours": "1"}\n{"blocks\xff"\n')
    done = import_pipeline(source, target)
    assert done.converted == done.tensors
    assert_same(params_of(target), params_of(source))


def test_an_interrupted_export_keeps_the_files_that_are_whole(
    tmp_path, source, imported, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("convert.progress.finish", full_disk)
        with pytest.raises(OSError, match="No space"):
            export_safetensors(imported, tmp_path / "back")
    record = tmp_path / "back.partial" / "progress.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:2]))
    files = [tmp_path / "back.partial" / "transformer" / name for name in FILES]
    before = [path.stat().st_ino for path in files]
    export_safetensors(imported, tmp_path / "back")
    after = [(tmp_path / "back" / "transformer" / name).stat().st_ino for name in FILES]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]
    assert file_bytes(tmp_path / "back") == file_bytes(source)


def test_an_import_does_not_go_on_in_an_unfinished_export(tmp_path, source, imported, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("convert.progress.finish", full_disk)
        with pytest.raises(OSError, match="No space"):
            export_safetensors(imported, tmp_path / "target")
    with pytest.raises(UserError, match="another conversion left unfinished"):
        import_pipeline(source, tmp_path / "target")


def test_licence_and_model_card_travel_and_pickles_do_not(tmp_path, tensors):
    source = write_pipeline(tmp_path / "source", tensors)
    (source / "transformer" / "LICENCE.md").write_text("the weights' terms")
    (source / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (source / ".cache").mkdir()
    (source / ".cache" / "lock").write_text("")
    import_pipeline(source, tmp_path / "imported")
    export_safetensors(tmp_path / "imported", tmp_path / "back")
    for folder in ("imported", "back"):
        for name in ("LICENSE.txt", "README.md", "vae/NOTICE", "transformer/LICENCE.md"):
            assert (tmp_path / folder / name).read_text() == (source / name).read_text()
    expected = set(file_bytes(source)) - {"vae/diffusion_pytorch_model.bin", ".cache/lock"}
    assert set(file_bytes(tmp_path / "back")) == expected


def damaged_copy(imported: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(imported, copy)
    for path in (copy / "transformer" / "arrays" / "d").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return copy


def test_a_damaged_import_is_refused(tmp_path, imported):
    copy = damaged_copy(imported, tmp_path)
    with pytest.raises(UserError, match="incomplete or damaged"):
        params_of(copy)
    with pytest.raises(UserError, match="incomplete or damaged"):
        export_safetensors(copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2, expected 1"),
        ({"files": {"../outside.safetensors": "{}"}}, "outside its folder"),
        ({"index": {"name": "/etc/x", "text": ""}}, "outside its folder"),
        ({"index": ["x"], "sha256": 1}, "sha256 is not an object.*; index is neither null"),
        ({"files": None}, "files is not an object of strings"),
        ({"leaves": []}, "leaves is not an object"),
        ({"leaves": {"x": {"shape": "3", "dtype": "F32"}}}, "x without a shape"),
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused(tmp_path, imported, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(imported, copy)
    path = copy / "transformer" / array_tree.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        export_safetensors(copy, tmp_path / "back")


def test_a_config_of_another_size_is_refused_beside_arrays(tmp_path, imported):
    copy = tmp_path / "copy"
    shutil.copytree(imported, copy)
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 48}))
    message = r"blocks.ffn.up.kernel is \[3, 24, 35\], expected \[3, 24, 48\]"
    with pytest.raises(UserError, match=message):
        params_of(copy)
