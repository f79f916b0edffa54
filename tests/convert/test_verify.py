"""The certificate, and the three commands as a user calls them."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from convert.certificate import as_table, largest_error
from convert.verify import verify
from tests.convert.pipelines import random_tensors, write_pipeline


def test_a_true_conversion_gets_a_certificate_of_zeros(source, imported):
    certificate = verify(source, imported)
    assert certificate == json.loads((imported / "certificate.json").read_text())
    assert certificate["equal"]
    assert certificate["counts"]["equal"] == certificate["counts"]["tensors"] == 96
    assert set(certificate["layers"]) == {"outside the blocks", *(f"blocks.{i}" for i in range(3))}
    assert all(layer["max_error"] == 0 for layer in certificate["layers"].values())
    assert certificate["files"]["LICENSE.txt"] == "equal"


def test_one_changed_value_one_missing_file_and_a_new_licence_are_found(tmp_path, source, tensors):
    changed = dict(tensors)
    bias = changed["blocks.1.ffn.net.2.bias"].copy()
    bias[3] += 0.5
    other = write_pipeline(tmp_path / "other", changed | {"blocks.1.ffn.net.2.bias": bias})
    (other / "LICENSE.txt").write_text("other terms")
    (other / "README.md").unlink()
    (other / "new.txt").write_text("")
    certificate = verify(source, other)
    assert not certificate["equal"]
    found = certificate["tensors"]["blocks.1.ffn.net.2.bias"]
    assert found["max_error"] == pytest.approx(0.5, abs=1e-6)  # float32 rounding of the sum
    assert found["max_relative_error"] == pytest.approx(
        0.5 / np.abs(tensors["blocks.1.ffn.net.2.bias"]).max(), rel=1e-6
    )
    assert certificate["layers"]["blocks.1"]["max_error"] == found["max_error"]
    assert certificate["layers"]["blocks.1"]["equal"] == 26
    strange = {path: what for path, what in certificate["files"].items() if what != "equal"}
    assert strange == {"LICENSE.txt": "different", "README.md": "missing", "new.txt": "unexpected"}
    assert "differs: blocks.1.ffn.net.2.bias, error 0.5" in as_table(certificate)


def test_other_shapes_types_and_names_are_differences(tmp_path, source, tensors):
    half = random_tensors("bfloat16")
    other = dict(tensors) | {"proj_out.bias": half["proj_out.bias"]}
    other["scale_shift_table"] = other["scale_shift_table"][:, :1]
    other["new"] = other.pop("proj_out.weight")
    certificate = verify(source, write_pipeline(tmp_path / "other", other))
    assert certificate["missing"] == ["proj_out.weight"]
    assert certificate["unexpected"] == ["new"]
    assert certificate["tensors"]["scale_shift_table"]["max_error"] is None
    assert 0 < certificate["tensors"]["proj_out.bias"]["max_relative_error"] < 2**-8
    assert certificate["counts"]["equal"] == 96 - 3


def test_the_commands_end_with_the_codes_they_promise(tmp_path, source, capsys):
    imported, back = str(tmp_path / "imported"), str(tmp_path / "back")
    assert main(["import", str(source), imported]) == 0
    assert main(["export", imported, back]) == 0
    assert main(["verify", str(source), back]) == 0
    assert "96 of 96 tensors equal to the bit, 7 other files; EQUAL" in capsys.readouterr().out
    (tmp_path / "back" / "README.md").write_text("changed")
    assert main(["verify", str(source), back]) == 1
    for words in (
        ["import", str(source), imported],
        ["import", imported, str(tmp_path / "again")],
        ["import", str(source), str(source / "inside")],
        ["export", str(source), str(tmp_path / "again")],
        ["import", str(tmp_path / "nothing"), str(tmp_path / "again")],
    ):
        capsys.readouterr()
        assert main(words) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert text.count("\n") == 1
    assert not (tmp_path / "again").exists()


def test_a_packed_pipeline_is_neither_imported_nor_verified(tmp_path, source, capsys):
    packed = tmp_path / "packed"
    shutil.copytree(source, packed)
    path = packed / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"a": 1}}))
    assert main(["import", str(packed), str(tmp_path / "imported")]) == 2
    assert "holds a packed transformer" in capsys.readouterr().err
    assert main(["verify", str(source), str(packed)]) == 2
    assert "is packed" in capsys.readouterr().err


def refusal(words: list[str], capsys) -> str:
    """What the command says; it must end with 2."""
    capsys.readouterr()
    assert main(words) == 2
    return capsys.readouterr().err


def test_options_that_the_folder_has_no_use_for_are_refused(tmp_path, source, imported, capsys):
    target = str(tmp_path / "target")
    words = ["--bits", "3,3", "--released-step", "5", "--clip-index", "countdown"]
    text = refusal(["import", str(source), target, *words], capsys)
    assert "leave --clip-index, --bits, --released-step away" in text
    words = ["--approximate", "--dtype", "float32"]
    text = refusal(["export", str(imported), target, *words], capsys)
    assert "--dtype, --approximate asks for the release's names: add --released" in text


@pytest.mark.parametrize("bits", ["4", "4,4,4", "a,b"])
def test_bits_of_another_form_say_what_is_expected(bits, capsys):
    with pytest.raises(SystemExit) as end:
        main(["import", "a", "b", "--bits", bits])
    assert end.value.code == 2
    assert "expected WEIGHTS,ACTIVATIONS such as 4,4" in capsys.readouterr().err


def test_verify_and_export_say_what_they_take(tmp_path, source, capsys):
    assert "are the same folder" in refusal(["verify", str(source), str(source)], capsys)
    checkpoint, packed = tmp_path / "checkpoint", tmp_path / "packed"
    checkpoint.mkdir()
    text = refusal(["verify", str(checkpoint), str(source)], capsys)
    assert "verify takes two full-precision pipelines" in text
    shutil.copytree(source, packed)
    path = packed / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"a": 1}}))
    assert "add --released" in refusal(["export", str(packed), str(tmp_path / "x")], capsys)


def test_what_is_not_a_number_has_no_largest_error():
    one, other = np.ones(3, np.float32), np.array([1, np.nan, 1], ml_dtypes.bfloat16)
    assert largest_error(one, other) == (None, None)
    assert largest_error(np.full(1, np.inf), np.full(1, np.inf)) == (None, None)
    assert largest_error(one, one + 1) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["import", "a", "b"], "continues"),
        (["export", "a", "b"], "continues"),
        (["import", "a", "b", "--base", "c"], "starts again"),
        (["export", "a", "b", "--released"], "starts again"),
        (["verify", "a", "b"], "starts again"),
    ],
)
def test_an_interrupted_command_says_whether_it_goes_on(words, what, monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.__main__.run", interrupted)
    assert main(words) == 130
    assert capsys.readouterr().err == f"interrupted; the same command {what}\n"


def test_the_help_of_verify_tells_its_file_and_its_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "DST/certificate.json" in text
    assert "1: a difference was found" in text
