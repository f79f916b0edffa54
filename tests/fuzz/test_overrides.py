"""Command lines: refused in one sentence, or the config holds what was asked, and it is sane."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvgen_jax.errors import UserError
from tests.fuzz.campaign import drawn, tried

ROOT = Path(__file__).parents[2]
CONFIGS = ("tiny_w4a4", "tiny_w4a4", "wan14b_w4a4", "cogvideox2b_w3a3")
CODE = "__import__('pathlib').Path('fuzz_ran_this').touch()"
NUMBERS = ["-1", "0", "1", "2", "3", "16", "-0.0", "0.5", "1.0", "1e-3", "1e400", "-inf", "nan"]
NUMBERS += [
    "9" * 10,
    "9" * 30,
    "9" * 5000,
    "1_0",
    " 4",
    "+4",
    "0x10",
    "\u0664",
    "1e3",
    "2147483648",
]
WORDS = ["", "True", "false", "None", "yes", "auto", "int8", "float32", "cosine", "a b", "-", "--"]
PATHS = ["/etc/passwd", "..", "gs://", "file:///etc", "~", "x" * 5000, "\udcff", "a\nb", "$(ls)"]
TUPLES = ["()", "(1,)", "[1]", "((", "(1", "{}", "(20, 30)", "(0,)", "('a',)", "(None,)", "(1e9,)"]
TUPLES += ["(('blocks.attn1.to_q', 8, 8),)", "(('a', 8, 8),)", "(('a', 8),)", "(('a', 'b', 'c'),)"]
TUPLES += ["(((),1,1),)", "(({},4,4),)", "('blocks.attn1.to_q',)", "(()," * 50, "(" * 200, CODE]
values = st.one_of(
    st.sampled_from(NUMBERS + WORDS + PATHS + TUPLES),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0"), max_size=12),
)
others = ("config.x", "config", "config.train", "config.data.source.x", "config.quant.bits.0")
others += (
    "config.__class__",
    "config.train.__init__",
    "config.get_config",
    "config.quant",
    "confi",
)
flags = ("job", "workdir", "prompt", "seed", "target", "compile", "plan_json", "jbo", "help", "")


@pytest.fixture(scope="module")
def parser():
    command = [sys.executable, "-m", "tests.fuzz.parse_each"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, **pipes) as process:

        def ask(*arguments: str) -> dict:
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def asked(text: str, default: object) -> str:
    """The repr of what a flag's text asks for, by Python's own reading of the default's type."""
    if isinstance(default, bool):
        return repr({"true": True, "t": True, "1": True}.get(text.lower(), False))
    if isinstance(default, tuple):
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError, MemoryError):
            value = text  # One name needs no quotes.
        return repr(tuple(value) if isinstance(value, tuple | list) else (value,))
    if isinstance(default, int) and text.startswith("0x"):
        return repr(int(text, 16))
    return repr(type(default)(text))


@pytest.fixture(scope="module")
def defaults(parser):
    return {name: parser("--config", f"configs/{name}.py")["config"] for name in CONFIGS}


@drawn(40)
@given(st.data())
def test_overrides_are_refused_or_do_what_they_say(parser, defaults, data):
    name = data.draw(st.sampled_from(CONFIGS))
    before = defaults[name]
    keys = st.one_of(st.sampled_from(sorted(before)), st.sampled_from(sorted(before)))
    given = {}
    for _ in range(data.draw(st.sampled_from((1, 1, 1, 2)))):
        given[data.draw(keys)] = data.draw(values)
    words = [f"--config.{key}={value}" for key, value in given.items()]
    if data.draw(st.integers(0, 9)) == 0:
        words.append(f"--{data.draw(st.sampled_from(others + flags))}={data.draw(values)}")
    with tried("overrides"):
        said = parser("--config", f"configs/{name}.py", *words)
        if "refused" in said:
            raise UserError(said["refused"])
        assert "config" in said, f"{words}: {said['crashed']}"
        for key, value in said["config"].items():
            expected = before[key]
            if key in given:
                default = ast.literal_eval(before[key])
                expected = asked(given[key], default)
                if isinstance(default, int | float):
                    assert (
                        abs(float(ast.literal_eval(value) if value[0] in "FT" else value)) < 2**32
                    ), (key, value)  # False for nan.
            assert value == expected, (words, key)
    assert not (ROOT / "fuzz_ran_this").exists()
