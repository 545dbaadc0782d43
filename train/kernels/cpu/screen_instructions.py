"""The part of the 8-bit screen in processor instructions: the estimates of a block, and which of them are kept.

These functions for compiled loops are written as LLVM code, which numba inserts at each call. VPDPBUSD of AVX-512 VNNI
multiplies four pairs of bytes and adds the products to a sum, for 16 sums at once; the sums of 14 rows x 32 latents
stay in registers, become estimates there, and are compared with each row's bound; VPCOMPRESS writes those above it.

Tested in tests/train/kernels/cpu/test_screen.py.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_VECTORS, _LANES = 2, 16
ROWS, PANEL = 14, _VECTORS * _LANES
"""A block has 14 x 32 estimates, in 28 of the 32 vector registers."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS, _BITS = (ir.VectorType(kind, _LANES) for kind in (_I32, _F32, ir.IntType(1)))
_BYTES = ir.VectorType(ir.IntType(8), 4 * _LANES) if binding.llvm_version_info[0] >= 21 else _INTS
"""The type of VPDPBUSD's operands: bytes since LLVM 21."""


def _choice(name: str) -> Any:
    """The LLVM operation of that name on two float32 numbers, neither a NaN: loops of it are vectorised, unlike those
    of comparisons and branches."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 2)
        operation = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.f32")
        return builder.call(operation, arguments, fastmath=("nnan", "nsz"))

    @intrinsic
    def choose(typing_context: Any, a: Any, b: Any) -> Any:
        return types.float32(types.float32, types.float32), emit

    return choose


greater, lesser = _choice("maxnum"), _choice("minnum")


@intrinsic
def collect_block(
    typing_context, left, right, quads, offset, scale, size, margin, bound, latent, guesses, latents, room, counts
):
    """Estimate 14 rows times a panel, and add those that may exceed their row's bound to its candidates.

    left: int32 [quads, 14]; right: int32 [quads, 32]; offset: int32 [14], the sums' initial values; scale, size: [32];
    margin, bound: [14]; latent: int32 [32], the panel's latents. A latent is added if estimate + margin * size > bound,
    with estimate = sum * scale: the estimate goes to guesses float32 [14, room], the latent to latents int32
    [14, room], both at the row's count, int32 [14], which goes up. The 32 places beyond may be overwritten. All
    arguments but `quads` and `room` are addresses.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _keep_above(builder, _multiply(builder, *arguments[:4]), *arguments[4:])
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 13), emit


def _multiply(builder: Any, left: Any, right: Any, quads: Any, offset: Any) -> list[list[Any]]:
    """The sums of 14 rows, two vectors of 16 latents each."""
    add_products = _instruction(builder, "x86.avx512.vpdpbusd.512", _INTS, _INTS, _BYTES, _BYTES)
    starts = [_everywhere(builder, _load(builder, offset, r, _I32), _INTS) for r in range(ROWS)]
    entry = builder.block
    loop, done = (builder.function.append_basic_block(name) for name in ("quads", "sums"))
    builder.branch(loop)
    builder.position_at_end(loop)
    quad = builder.phi(_I64)
    quad.add_incoming(_I64(0), entry)
    before = [[builder.phi(_INTS) for _ in range(_VECTORS)] for _ in range(ROWS)]
    panel = builder.add(right, builder.mul(quad, _I64(4 * PANEL)))
    block = builder.add(left, builder.mul(quad, _I64(4 * ROWS)))
    columns = [_load(builder, panel, _LANES * j, _BYTES) for j in range(_VECTORS)]
    after = []
    for r, olds in enumerate(before):
        row = builder.bitcast(_everywhere(builder, _load(builder, block, r, _I32), _INTS), _BYTES)
        pairs = zip(olds, columns, strict=True)
        after.append([builder.call(add_products, [old, column, row]) for old, column in pairs])
    following = builder.add(quad, _I64(1))
    quad.add_incoming(following, loop)
    for first, olds, news in zip(starts, before, after, strict=True):
        for old, new in zip(olds, news, strict=True):
            old.add_incoming(first, entry)
            old.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, quads), loop, done)
    builder.position_at_end(done)
    return after


def _keep_above(builder, sums, scale, size, margin, bound, latent, guesses, latents, room, counts):
    """Write the estimates that may exceed their row's bound, and their latents."""
    pack_floats = _instruction(builder, "x86.avx512.mask.compress.v16f32", _FLOATS, _FLOATS, _FLOATS, _BITS)
    pack_ints = _instruction(builder, "x86.avx512.mask.compress.v16i32", _INTS, _INTS, _INTS, _BITS)
    count_bits = _instruction(builder, "ctpop.i16", _I16, _I16)
    places = [_LANES * j for j in range(_VECTORS)]
    scales, sizes = ([_load(builder, address, place, _FLOATS) for place in places] for address in (scale, size))
    numbers = [_load(builder, latent, _LANES * j, _INTS) for j in range(_VECTORS)]
    for r, row in enumerate(sums):
        margins, bounds = (_everywhere(builder, _load(builder, a, r, _F32), _FLOATS) for a in (margin, bound))
        estimates, masks = [], []
        for sum_, scale_, size_ in zip(row, scales, sizes, strict=True):
            estimate = builder.fmul(builder.sitofp(sum_, _FLOATS), scale_)
            most = builder.fadd(estimate, builder.fmul(margins, size_, flags=["contract"]), flags=["contract"])
            estimates.append(estimate)
            masks.append(builder.fcmp_ordered(">", most, bounds))
        joining = [builder.bitcast(mask, _I16) for mask in masks]
        with builder.if_then(builder.icmp_unsigned("!=", builder.or_(*joining), _I16(0)), likely=False):
            count = builder.sext(_load(builder, counts, r, _I32), _I64)
            for estimate, number, mask, bits in zip(estimates, numbers, masks, joining, strict=True):
                end = builder.add(builder.mul(room, _I64(r)), count)
                packed = builder.call(pack_floats, [estimate, ir.Constant(_FLOATS, None), mask])
                builder.store(packed, _at(builder, guesses, end, _FLOATS), align=4)
                packed = builder.call(pack_ints, [number, ir.Constant(_INTS, None), mask])
                builder.store(packed, _at(builder, latents, end, _INTS), align=4)
                count = builder.add(count, builder.zext(builder.call(count_bits, [bits]), _I64))
            builder.store(builder.trunc(count, _I32), _at(builder, counts, r, _I32), align=4)


def _instruction(builder: Any, name: str, result: Any, *operands: Any) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, operands), f"llvm.{name}")


def _at(builder: Any, address: Any, place: Any, kind: Any) -> Any:
    """A pointer to `place` times 4 bytes after an address."""
    place = _I64(place) if isinstance(place, int) else place
    return builder.inttoptr(builder.add(address, builder.shl(place, _I64(2))), kind.as_pointer())


def _load(builder: Any, address: Any, place: int, kind: Any) -> Any:
    return builder.load(_at(builder, address, place, kind), align=4)


def _everywhere(builder: Any, number: Any, kind: Any) -> Any:
    """A number in all 16 places of a vector."""
    none = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(none, number, _I32(0))
    return builder.shuffle_vector(first, none, ir.Constant(_INTS, [0] * _LANES))
