"""The Triton programs through Triton's compiler for GPUs that are not here, and its assembler.

`pytest -s` prints what the compiler made of each program.
"""

import re
import subprocess
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import pytest

from kernels.operands import Product
from kernels.shapes import of_models
from kernels.triton_matmul import program_constants, tile_for
from kernels.triton_quantize import quantizer_constants

triton = pytest.importorskip("triton")

from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.triton_matmul_program import UNPACK_ASSEMBLY, quantized_matmul_program  # noqa: E402
from kernels.triton_quantize_program import quantize_tokens_program  # noqa: E402

TOOLS = Path(nvidia.__file__).parent / "bin"
CAPABILITIES = (80, 89, 90)
# What one block may have, from the CUDA programming guide's table of compute capabilities.
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
POINTERS = {"codes_ptr": "*i8", "w_codes_ptr": "*i8", "second_ptr": "*i8", "third_ptr": "*i8"}


def compiled(program, constants, capability, *, warps, stages, types=()):
    """The compiled program, and what its assembler says of registers."""
    pointers = POINTERS | dict(types)
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "*fp32")
        for name in program.arg_names
    } | {"M": "i32"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    kernel = triton.compile(
        ASTSource(program, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": warps,
            "num_stages": stages,
            "ptx_version": 87,
            "enable_fp_fusion": False,
        },
    )
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    return kernel


def registers(kernel, tmp_path):
    """Registers per thread and bytes of the stack, which is where spilled registers go."""
    return tuple(
        int(re.search(rf"{word}:(\d+)", tool("cuobjdump", "-res-usage", kernel, tmp_path))[1])
        for word in ("REG", "STACK")
    )


def tool(name, option, kernel, folder):
    path = folder / "program.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [TOOLS / name, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main_loop(kernel, folder):
    """Counts the opcodes of the loop that multiplies."""
    labels, instructions, loops = {}, [], []
    for line in tool("nvdisasm", "-c", kernel, folder).splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*);", line):
            instructions.append(found[1])
            target = re.search(r"^BRA.*`\((\.L_\w+)\)", found[1])
            if target and target[1] in labels:
                body = instructions[labels[target[1]] :]
                loops.append(Counter(re.split(r"[.\s]", i)[0] for i in body))
    loops = [loop for loop in loops if loop["IMMA"] + loop["IGMMA"]]
    assert len(loops) == 1
    return loops[0]


def opcodes(kernel, folder):
    """Counts the opcodes of a whole program."""
    text = tool("nvdisasm", "-c", kernel, folder)
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", text))


def product(rows, inner, columns, weight_bits=4, act_bits=4, out_dtype=jnp.bfloat16):
    return Product(rows, inner, columns, weight_bits, act_bits, out_dtype)


MODELS = ("Wan-14B 480p", "Wan-1.3B 480p", "CogVideoX-2B")
LARGE = (32760, 5120, 5120)
PRODUCTS = {
    **{
        f"{shape.model}, {shape.layer}": product(*shape[2:])
        for shape in of_models(*MODELS)
        if shape.layer != "text embedder"
    },
    "a few tokens": product(2, 5120, 5120),
    "float32 out": product(32760, 5120, 64, out_dtype=jnp.float32),
    "odd": product(130, 129, 200),
    "W3A3": product(*LARGE, 3, 3),
    "W4A8": product(*LARGE, 4, 8),
    "W8A8": product(*LARGE, 8, 8),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_product_runs_on_eight_bit_tensor_cores_without_spilling(name, capability, tmp_path):
    p = PRODUCTS[name]
    tile = tile_for(capability, p)
    out = "*bf16" if p.out_dtype == jnp.bfloat16 else "*fp32"
    kernel = compiled(
        quantized_matmul_program,
        program_constants(p, tile, asymmetric=True, bias=True),
        capability,
        warps=tile.warps,
        stages=tile.stages,
        types=dict.fromkeys(("hidden_ptr", "left_ptr", "y_ptr"), out),
    )
    opcode = r"wgmma\.mma_async\S*\.s32\.s8\.s8" if capability == 90 else r"mma\.sync\S*s8\.s8\.s32"
    assert re.search(opcode, kernel.asm["ptx"])
    used, stack = registers(kernel, tmp_path)
    assert stack == 0
    loop = main_loop(kernel, tmp_path)
    multiplications = loop["IMMA"] + loop["IGMMA"]
    print(
        f"\nsm_{capability} {name}: {p}, {tile}, {used} registers, {kernel.metadata.shared} bytes "
        f"shared, {loop.total()} instructions for {multiplications} {dict(loop.most_common(8))}"
    )
    if p.rows > 512 and p.columns > 128:
        # A wgmma of 64 x 128 x 32 takes 64 cycles of its four warps, an mma of 16 x 8 x 32 takes 8
        # on Ampere; unpacking and addressing must not take as long.
        assert loop.total() <= (19 if capability == 90 else 4) * multiplications


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_low_rank_term_fits_the_registers(capability, tmp_path):
    p = product(*LARGE)
    tile = tile_for(capability, p, rank=32)
    kernel = compiled(
        quantized_matmul_program,
        program_constants(p, tile, asymmetric=True, bias=True, rank=32),
        capability,
        warps=tile.warps,
        stages=tile.stages,
        types=dict.fromkeys(("hidden_ptr", "left_ptr", "y_ptr"), "*bf16"),
    )
    assert re.search(r"mma\S*\.f32\.bf16\.bf16", kernel.asm["ptx"])
    assert registers(kernel, tmp_path)[1] == 0


def test_the_assembly_unpacks_every_byte_as_shifts_do():
    """Carries out the three instructions on all bytes, four a register."""
    values = {"$2": None, "shifted": None, "$0": None, "$1": None}
    for first in range(0, 256, 4):
        packed = bytes(range(first, first + 4))
        values["$2"] = int.from_bytes(packed, "little")
        for line in UNPACK_ASSEMBLY.splitlines()[2:-1]:
            operation, target, a, b = re.match(r"(\w+)\.b32 (\S+), (\S+), (\S+);", line).groups()
            a, b = values[a], int(b, 0)
            values[target] = a << b & 0xFFFFFFFF if operation == "shl" else a & b
        low, high = (values[name].to_bytes(4, "little") for name in ("$0", "$1"))
        assert list(low) == [byte << 4 & 255 for byte in packed]
        assert list(high) == [byte & 0xF0 for byte in packed]


QUANTIZERS = {
    "wan-14b": {"inner": 5120},
    "wan-14b-qkv": {
        "inner": 5120,
        "count": 3,
        "front": "norm",
        "rows_per_batch": 32760,
        "eps": 1e-6,
        "dtype": jnp.bfloat16,
    },
    "wan-14b-gelu": {"inner": 13824, "front": "gelu", "dtype": jnp.bfloat16},
    "cogvideox-2b-qkv": {
        "inner": 1920,
        "count": 3,
        "front": "norm",
        "affine": True,
        "rows_per_batch": 17776,
        "leading": 226,
        "eps": 1e-5,
        "dtype": jnp.bfloat16,
    },
    "wan-1.3b-gelu": {"inner": 8960, "front": "gelu", "dtype": jnp.bfloat16},
    "odd": {"inner": 129},
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_quantizer_reads_once_divides_exactly_and_does_not_spill(name, capability, tmp_path):
    constants = quantizer_constants(**QUANTIZERS[name])
    kernel = compiled(
        quantize_tokens_program,
        constants,
        capability,
        warps=constants["BLOCK"] // 256,
        stages=1,
        types={"x_ptr": "*bf16"},
    )
    ptx = kernel.asm["ptx"]
    used, stack = registers(kernel, tmp_path)
    assert stack == 0
    # The remainders of the quotients are the only fused operations: no other product is contracted
    # with a sum. Division by the levels and by the scale, for its inverse, is IEEE's.
    eights = 8 * constants["CHUNKS"] * constants["COUNT"]
    assert len(re.findall(r"fma\.rn\.f32", ptx)) == 4 * eights
    assert len(re.findall(r"div\.rn\.f32", ptx)) >= 3 * constants["COUNT"]
    if constants["K"] % 16 == 0 and constants["FRONT"] != "norm":
        wide = len(re.findall(r"ld\.global\.v4\.b32", ptx))
        assert wide == constants["CHUNKS"]
    instructions = sum(opcodes(kernel, tmp_path).values())
    print(
        f"\nsm_{capability} {name}: {used} registers, {constants['CHUNKS']} chunks, "
        f"{instructions / eights:.1f} instructions per code"
    )
