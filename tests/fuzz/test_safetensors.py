"""Safetensors files and their index: refused, or read as the reference reads them."""

import json

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from convert.safetensors_file import DTYPES
from convert.tensors import Tensors
from qvgen_jax.errors import UserError
from tests.fuzz.campaign import LONGEST_MESSAGE, drawn, generators, tried
from tests.fuzz.mutations import STRANGE, mutated_bytes, mutated_json

TENSORS = {
    "blocks.0.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "blocks.0.bias": np.array([0.5, -2.0], np.float16),
    "codes": np.arange(9, dtype=np.uint8).reshape(3, 3),
    "none": np.zeros((0, 3), np.int32),
    "one": np.array(7, np.int64),
}


SHARD = "model-00001-of-00002"


def file_bytes(header: str, body: bytes) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + body


def read_as_the_reference(folder, files: dict[str, bytes]) -> None:
    """Reads every tensor of the folder; each must be what the reference finds in its file."""
    found = Tensors(folder)
    arrays = {name: found[name] for name in found}
    theirs = {
        name: tensor
        for file in found.headers
        for name, tensor in safetensors.deserialize(files[file])
    }
    assert set(arrays) == set(theirs)
    for name, array in arrays.items():
        assert list(array.shape) == theirs[name]["shape"]
        assert found.infos[name].kind == theirs[name]["dtype"]
        assert array.tobytes() == bytes(theirs[name]["data"])


HUGE = {2**14000: "9" * 4200, 2**14000 + 1: "9" * 5000}  # Written so; the second no JSON reads.
sizes = st.one_of(st.integers(0, 4), st.integers(-2, 2**70), st.sampled_from((*STRANGE, *HUGE)))
names = st.one_of(
    st.sampled_from(("a", "b", "__metadata__", "../x")),
    st.text(st.characters(codec=None), max_size=8),
)


@st.composite
def headers(draw) -> tuple[bytes, bytes]:
    """A header that is right but for what is drawn to be wrong, and the tensors' bytes."""
    entries, end = [], 0
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=4))
        stop = end + int(np.prod(shape)) * DTYPES[kind].itemsize
        entries.append((draw(names), {"dtype": kind, "shape": shape, "data_offsets": [end, stop]}))
        end = stop
    if draw(st.booleans()):
        entries.append(("__metadata__", draw(st.sampled_from(({"format": "pt"}, *STRANGE)))))
    if entries and draw(st.booleans()):
        entry = draw(st.sampled_from(entries))[1]
        if isinstance(entry, dict):
            key = draw(st.sampled_from(("dtype", "shape", "data_offsets", "more")))
            bad = st.one_of(
                st.lists(sizes, max_size=3),
                st.lists(st.sampled_from((0, 1)), min_size=60, max_size=70),
                st.sampled_from((*STRANGE, "F4", "C64", "f32")),
            )
            entry[key] = draw(bad)
    body = draw(st.binary(min_size=end, max_size=end)) + draw(st.binary(max_size=2))
    # By hand: json.dumps of a dict has no name twice, and this writes numbers of any length.
    rows = (f"{json.dumps(name)}:{dumped(value)}" for name, value in entries)
    raw = ("{" + ",".join(rows) + "}" + " " * draw(st.integers(0, 8))).encode()
    length = draw(st.sampled_from((len(raw), len(raw), len(raw), len(raw) + 1, 2**63, 0, 1)))
    return length.to_bytes(8, "little") + raw, body


def dumped(value) -> str:
    """JSON of a value whose whole numbers may be longer than Python writes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{dumped(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumped, value)) + "]"
    return HUGE[value] if type(value) is int and value in HUGE else json.dumps(value)


@drawn(200)
@given(headers())
def test_a_header_is_refused_or_read_as_the_reference_reads_it(tmp_path_factory, drawn):
    folder = tmp_path_factory.getbasetemp() / "headers"
    folder.mkdir(exist_ok=True)
    data = b"".join(drawn)
    (folder / "model.safetensors").write_bytes(data)
    with tried("safetensors headers"):
        read_as_the_reference(folder, {"model.safetensors": data})


def test_a_mutated_file_is_refused_or_read_as_the_reference_reads_it(tmp_path):
    good = save(TENSORS, metadata={"format": "pt"})
    for label, rng in generators("safetensors files", 100):
        data = mutated_bytes(good, rng)
        (tmp_path / "model.safetensors").write_bytes(data)
        with tried("safetensors files"):
            try:
                read_as_the_reference(tmp_path, {"model.safetensors": data})
            except AssertionError as error:
                raise AssertionError(label) from error


def test_a_mutated_index_is_refused_or_every_tensor_is_from_a_file_beside_it(tmp_path):
    shards = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    where = {name: shards[i % 2] for i, name in enumerate(TENSORS)}
    files = {
        shard: save({name: TENSORS[name] for name in TENSORS if where[name] == shard})
        for shard in shards
    }
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(files[shards[0]])
    for shard, data in files.items():
        (folder / shard).write_bytes(data)
    good = {"metadata": {"total_size": 1}, "weight_map": where}
    for _, rng in generators("safetensors indexes", 100):
        text = json.dumps(mutated_json(good, rng)) if rng.random() < 0.7 else ""
        raw = text.encode() or mutated_bytes(json.dumps(good).encode(), rng)
        (folder / "model.safetensors.index.json").write_bytes(raw)
        with tried("safetensors indexes"):
            read_as_the_reference(folder, files)


def entry(shape: str, offsets: str = "[0,0]") -> str:
    return f'{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}}}}}'


# Each crashed the reader, or kept it busy for ever, when it was first tried.
FOUND = {
    "a product that takes hours": (entry(f"[{','.join(['9' * 4200] * 3000)}]"), "2\\^63"),
    "a product too long to print": (entry(f"[{','.join(['9' * 4200] * 10)}]"), "2\\^63"),
    "more axes than numpy has": (entry(f"[{','.join('1' * 70)}]", "[0,1]"), "room for"),
    "empty, but for numpy too large": (entry("[0,4611686018427387904,4]"), "room for"),
    "half a character": (r'{"\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "half a"),
    "half a character about it": (
        r'{"__metadata__":{"a":"\ud800"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "not an object of strings",
    ),
    "every name twice": (
        "{" + ",".join(f'"{i // 2}":1' for i in range(60000)) + "}",
        "and 29980 more given twice",
    ),
    "a fault in every tensor": (
        "{" + ",".join(f'"{i}":1' for i in range(9999)) + "}",
        "and 9979 more",
    ),
}


@pytest.mark.parametrize("header", FOUND)
def test_a_header_that_was_found_to_crash_is_refused_at_once(tmp_path, header):
    text, message = FOUND[header]
    (tmp_path / "model.safetensors").write_bytes(file_bytes(text, b"x"))
    with pytest.raises(UserError, match=message) as told:
        Tensors(tmp_path)
    assert len(str(told.value)) < LONGEST_MESSAGE


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ('{"a": "\\ud800.safetensors"}', "names files outside its folder"),
        ('{"a": "' + "x" * 999 + '.safetensors"}', "names files outside its folder"),
        ('{"a": "loop.safetensors"}', "is a link that leads nowhere"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps({f"{i}": f"{SHARD}.safetensors" for i in range(9999)}), "and 9979 more"),
    ],
)
def test_an_index_that_was_found_to_crash_is_refused(tmp_path, weight_map, message):
    (tmp_path / f"{SHARD}.safetensors").write_bytes(file_bytes("{}", b""))
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(UserError, match=message) as told:
        Tensors(tmp_path)
    assert len(str(told.value)) < LONGEST_MESSAGE
