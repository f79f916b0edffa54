"""Converts pipelines between PyTorch's safetensors and sharded arrays, and proves it.

    python -m convert import SRC DST    # safetensors -> sharded arrays, for the trainer and `load`
    python -m convert export SRC DST    # an import -> the same safetensors, for PyTorch
    python -m convert verify SRC DST    # compare the two; writes DST/certificate.json
    python -m convert import CHECKPOINT DST --base BASE  # QVGen's release -> a packed pipeline
    python -m convert export PACKED DST --released       # a packed pipeline -> QVGen's release
    python -m convert verify CHECKPOINT DST --base BASE  # DST, imported so, against the checkpoint

The same import or export again continues an interrupted one; from and to QVGen's release, and
verify, start again. Exit code 0: done, or equal; 1: verify found a difference; 2: something given
is wrong, and one line says what.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from typing import Any

from convert.travel import Report
from qvgen_jax.errors import UserError

_EVERY_SECONDS = 5.0
_OF_IMPORT = ("base", "clip_index", "bits", "released_step", "phase_steps", "lora_alpha")
_OF_EXPORT = ("dtype", "approximate")

_DOES = {
    "import": "Make sharded arrays of a pipeline, or a packed pipeline of QVGen's release. "
    "Exit code 0: done; 2: something given is wrong.",
    "export": "Make safetensors for PyTorch of an import, or a folder for the release's scripts of "
    "a packed pipeline. Exit code 0: done; 2: something given is wrong.",
    "verify": "Compare a conversion with what it was made from and write DST/certificate.json. "
    "Exit code 0: equal; 1: a difference was found; 2: something given is wrong.",
}


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
    importing, exporting, verifying = (
        _command(commands, name, source, target)
        for name, source, target in (
            ("import", "a folder in diffusers' layout, or a hub name owner/name", "folder to make"),
            ("export", "a folder that import made, or a packed pipeline", "folder to make"),
            ("verify", "what the conversion was made from", "the conversion"),
        )
    )
    _add_released(
        importing.add_argument_group(
            "SRC is a checkpoint of QVGen's release",
            "not given: countdown, 4,4, no branch, the published recipe's T, alpha = r",
        )
    )
    _add_released(
        verifying.add_argument_group(
            "SRC is a checkpoint of QVGen's release, DST the packed pipeline imported from it",
            "not given, but for --base: as DST records its import",
        )
    )
    back = exporting.add_argument_group("SRC is a packed pipeline, DST for the release's scripts")
    back.add_argument("--released", action="store_true", help="write the release's names")
    back.add_argument("--dtype", choices=("bfloat16", "float32"), help="default bfloat16")
    # None, not False, where it is not given: see `_given`.
    back.add_argument(
        "--approximate",
        action="store_const",
        const=True,
        help="even what their code computes differently",
    )
    return parser.parse_args(argv)


def _add_released(group: Any) -> None:
    group.add_argument("--base", help="the full-precision pipeline it was trained from")
    group.add_argument(
        "--clip-index",
        choices=("countdown", "last", "t_mod_50"),
        help="as their inference with --fix, without it, or as their training",
    )
    group.add_argument("--bits", type=_bits, help="weights,activations")
    group.add_argument(
        "--released-step", type=int, help="steps it had trained: rank and gate are rebuilt and kept"
    )
    group.add_argument("--phase-steps", type=int, help="T of that training")
    group.add_argument("--lora-alpha", type=float, help="adapters are merged with alpha / r")


def _command(commands: Any, name: str, source: str, target: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=_DOES[name].partition(". ")[0], description=_DOES[name]
    )
    command.add_argument("source", metavar="SRC", help=source)
    command.add_argument("target", metavar="DST", help=target)
    return command


def _bits(text: str) -> tuple[int, int]:
    try:
        weights, activations = (int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected WEIGHTS,ACTIVATIONS such as 4,4"
        ) from error
    return weights, activations


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the options that the command line gave."""
    options = {name: getattr(arguments, name) for name in names}
    return {name: option for name, option in options.items() if option is not None}


def _options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def run(arguments: argparse.Namespace) -> int:
    """Does one command. Imports are here so that a wrong argument is told at once."""
    start = time.monotonic()
    if arguments.command == "verify":
        from convert.certificate import as_table

        certificate = _verify(arguments)
        print(as_table(certificate))
        return 0 if certificate["equal"] else 1
    work = _import if arguments.command == "import" else _export
    nbytes, what = work(arguments)
    seconds = time.monotonic() - start
    print(f"{arguments.target}: {nbytes:,} bytes of transformer, {what}, {seconds:.0f} s")
    return 0


def _import(arguments: argparse.Namespace) -> tuple[int, str]:
    """The bytes written, and what they are."""
    from convert.released import holds_released, import_released
    from convert.to_arrays import import_pipeline

    given = _given(arguments, _OF_IMPORT)
    if not holds_released(arguments.source):
        if given:
            raise UserError(
                f"{arguments.source} is no checkpoint of QVGen's release: no tensor has its names; "
                f"leave {_options(given)} away to import a pipeline"
            )
        done = import_pipeline(arguments.source, arguments.target, _meter("GB", 1e9))
        return done.nbytes, f"{done.converted} of {done.tensors} tensors in this call"
    _check_base(arguments)
    nbytes = import_released(
        arguments.source,
        given.pop("base"),
        arguments.target,
        **given,
        progress=_meter("tensors", 1),
    )
    return nbytes, "packed"


def _check_base(arguments: argparse.Namespace) -> None:
    if not arguments.base:
        raise UserError(
            f"{arguments.source} is a checkpoint of QVGen's release, a transformer alone: give the "
            "full-precision pipeline it was trained from, --base FOLDER"
        )


def _verify(arguments: argparse.Namespace) -> dict[str, Any]:
    """The certificate, which is written too."""
    from convert.released import holds_released
    from convert.released_verify import verify_released
    from convert.verify import is_packed, verify

    source, target, given = arguments.source, arguments.target, _given(arguments, _OF_IMPORT)
    if not is_packed(target) or not holds_released(source):
        if given:
            raise UserError(
                f"{_options(given)} {'is' if len(given) == 1 else 'are'} only for a checkpoint of "
                f"QVGen's release and the packed pipeline imported from it, not for {source} and "
                f"{target}; leave {'it' if len(given) == 1 else 'them'} away, or give `verify "
                "CHECKPOINT PACKED --base BASE`"
            )
        return verify(source, target, _meter("tensors", 1))
    _check_base(arguments)
    meter = _meter("tensors", 1)
    return verify_released(source, given.pop("base"), target, **given, progress=meter)


def _export(arguments: argparse.Namespace) -> tuple[int, str]:
    """The bytes written, and what they are."""
    given = _given(arguments, _OF_EXPORT)
    if arguments.released:
        from convert.released_export import export_released

        nbytes = export_released(
            arguments.source,
            arguments.target,
            **given,
            progress=_meter("tensors", 1),
        )
        return nbytes, "in the release's names"
    if given:
        raise UserError(
            f"{_options(given)} asks for the release's names: add --released to write them, or "
            "leave it away to export an import"
        )
    from convert.to_safetensors import export_safetensors

    nbytes = export_safetensors(arguments.source, arguments.target, _meter("GB", 1e9))
    return nbytes, "byte for byte"


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
        return run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # A full disk, a folder that may not be written.
        print(f"error: {error}; set it right and run the same command again", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted; the same command {_again(arguments)}", file=sys.stderr)
        return 130
    return 2


def _again(arguments: argparse.Namespace) -> str:
    """What the same command does after an interruption."""
    starts_again = arguments.command == "verify" or getattr(arguments, "released", False)
    starts_again = starts_again or getattr(arguments, "base", None)
    return "starts again" if starts_again else "continues"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
