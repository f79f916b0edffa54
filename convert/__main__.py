"""Converts pipelines between PyTorch's safetensors and sharded arrays, and proves it.

    python -m convert import SRC DST    # safetensors -> sharded arrays, for the trainer and `load`
    python -m convert export SRC DST    # an import -> the same safetensors, for PyTorch
    python -m convert verify SRC DST    # compare the two; writes DST/certificate.json

The same import or export again continues an interrupted one. Exit code 0: done, or equal; 1: verify
found a difference; 2: something given is wrong, and one line says what.
"""

import argparse
import sys
import time

from convert.travel import Report
from qvgen_jax.errors import UserError

_EVERY_SECONDS = 5.0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its folders."""
    text, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description=text,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_source, help_target in (
        ("import", "a folder in diffusers' layout, or a hub name owner/name", "the folder to make"),
        ("export", "a folder that import made", "the folder to make"),
        ("verify", "what the conversion was made from", "the conversion"),
    ):
        command = commands.add_parser(name)
        command.add_argument("source", metavar="SRC", help=help_source)
        command.add_argument("target", metavar="DST", help=help_target)
    return parser.parse_args(argv)


def run(command: str, source: str, target: str) -> int:
    """Does one command. Imports are here so that a wrong argument is told at once."""
    start = time.monotonic()
    if command == "verify":
        from convert.verify import as_table, verify

        certificate = verify(source, target, _meter("tensors", 1))
        print(as_table(certificate))
        return 0 if certificate["equal"] else 1
    if command == "import":
        from convert.to_arrays import import_pipeline

        done = import_pipeline(source, target, _meter("GB", 1e9))
        what, nbytes = f"{done.converted} of {done.tensors} tensors in this call", done.nbytes
    else:
        from convert.to_safetensors import export_safetensors

        what, nbytes = "byte for byte", export_safetensors(source, target, _meter("GB", 1e9))
    seconds = time.monotonic() - start
    print(f"{target}: {nbytes:,} bytes of transformer, {what}, {seconds:.0f} s")
    return 0


def _meter(unit: str, size: float) -> Report:
    """A line on stderr now and then."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _EVERY_SECONDS:
            last = time.monotonic()
            print(f"{done / size:.4g} of {total / size:.4g} {unit}", file=sys.stderr)

    return show


def main(argv: list[str]) -> int:
    """Exit code: see above; 130 when interrupted."""
    arguments = parse(argv)
    try:
        return run(arguments.command, arguments.source, arguments.target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # A full disk, a folder that may not be written.
        print(f"error: {error}; set it right and run the same command again", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
