"""What may not be in the sources: readers that run what they read, and shells."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("qvgen_jax", "convert", "kernels", "configs", "benchmarks")
SOURCES = [ROOT / "main.py", *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py")))]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {("os", "system"), ("os", "popen"), ("yaml", "load"), ("torch", "load")}
ATTRIBUTES |= {("subprocess", "getoutput"), ("subprocess", "getstatusoutput")}
FORBIDDEN = {"shell": True, "allow_pickle": True, "trust_remote_code": True}


def faults(tree: ast.AST):
    """Line and name of everything forbidden in a module."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        yield from ((node.lineno, name) for name in names if name in MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in CALLS:
            yield node.lineno, called.id
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            pair = (called.value.id, called.attr)
            if pair in ATTRIBUTES:
                yield node.lineno, ".".join(pair)
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg in FORBIDDEN and not (
                isinstance(value, ast.Constant) and value.value is not FORBIDDEN[keyword.arg]
            ):
                yield node.lineno, f"{keyword.arg}={ast.unparse(value)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_pickles_runs_text_or_starts_a_shell(path):
    assert not list(faults(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import load",
        "eval(text)",
        "os.system(name)",
        "subprocess.run(name, shell=True)",
        "np.load(path, allow_pickle=flag)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_what_is_forbidden_is_found(code):
    assert list(faults(ast.parse(code)))
