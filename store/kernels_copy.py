"""Copies chunks out of a mapped file past the cache, and checks each by its crc32c on the way, in one compiled loop.

How: an ordinary store fetches the line that it writes to and leaves it in the cache, where it drives out others; a
streaming ("non-temporal") store does neither, which takes a third off a copy. What is in a register on its way to the
copy is also folded into a checksum: a line of 64 bytes times x^512 modulo the polynomial, added to the next line, has
the remainder of both. Carry-less multiplications do that faster than memory gives the bytes, so that the checksum costs
nothing, and it is of the very bytes that are written, whatever becomes of the file meanwhile. (That memory then keeps
them is its own affair, as ever.) The loop goes over many chunks without the interpreter, so that threads do not queue
for its lock four times a chunk. What it does not do: run on processors without the instructions (`runs_here`), say what
is wrong with a chunk, or pay where the copy is read at once, as it comes back from memory then.

Shapes: n chunks to copy, B bytes in each, m rows of the memory that they are copied to.
"""

import functools
import mmap
import sys
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from store.row_loops import compiled

_LINE = 64
_POLYNOMIAL = 0x82F63B78  # crc32c, the highest power in the lowest bit, as in all that follows
_ALL = np.uint32(0xFFFFFFFF)
_PAGE, _WILL_NEED, _POPULATE_READ = mmap.PAGESIZE, 3, 22
_AHEAD = 4
"""Chunks that a disk is asked for before they are copied: it gave one thread 1.3 times as much as with none."""

_madvise = types.ExternalFunction("madvise", types.int32(types.uintp, types.uintp, types.int32))
_fadvise = types.ExternalFunction("posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32))


@functools.cache
def runs_here() -> bool:
    """Whether this is Linux on a processor that multiplies 64 bytes at once without carries (since 2019; AMD 2022)."""
    chosen = any(getattr(config, name, None) for name in ("CPU_NAME", "CPU_FEATURES"))  # numba compiles for another.
    features = binding.get_host_cpu_features()
    needed = ("avx512f", "vpclmulqdq", "sse4.2")
    return sys.platform == "linux" and not chosen and all(features.get(name, False) for name in needed)


def fold_constant(power: int) -> int:
    """x^power modulo the polynomial."""
    remainder = 1 << 31
    for _ in range(power):
        remainder = (remainder >> 1) ^ (_POLYNOMIAL if remainder & 1 else 0)
    return remainder


@intrinsic
def _crc_byte(typing_context: Any, state: Any, byte: Any) -> Any:
    """The state of a checksum after one more byte."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32 = ir.IntType(32)
        kind = ir.FunctionType(i32, [i32, ir.IntType(8)])
        return builder.call(
            cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse42.crc32.32.8"), arguments
        )

    return types.uint32(types.uint32, types.uint8), emit


@intrinsic
def _move_lines(typing_context: Any, source: Any, out: Any, lines: Any, state: Any) -> Any:
    """Copy one or more lines from an address to another, which is a multiple of 64; gives the checksum's new state."""
    return types.uint32(types.int64, types.int64, types.int64, types.uint32), _emit_lines


def _emit_lines(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    source, out, lines, state = arguments
    i8, i32, i64 = (ir.IntType(bits) for bits in (8, 32, 64))
    line = ir.VectorType(i64, 8)
    # Of each 128 bits, the first 64 have the higher powers. The products come out a bit further up than they should.
    factors = ir.Constant(line, [fold_constant(512 + 31), fold_constant(512 - 33)] * 4)
    kind = ir.FunctionType(line, [line, line, i8])
    multiply = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.pclmulqdq.512")
    kind = ir.FunctionType(i64, [i64, i64])
    take_word = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse42.crc32.64.64")
    nontemporal = builder.module.add_metadata([i32(1)])

    def move(at: Any) -> Any:
        read, write = (builder.inttoptr(builder.add(base, at), line.as_pointer()) for base in (source, out))
        moved = builder.load(read, align=1)
        builder.store(moved, write, align=_LINE).set_metadata("nontemporal", nontemporal)
        return moved

    end = builder.mul(lines, i64(_LINE))
    begun = builder.insert_element(ir.Constant(line, None), builder.zext(state, i64), i32(0))
    first = builder.xor(move(i64(0)), begun)
    entry = builder.block
    loop, done = (builder.function.append_basic_block(name) for name in ("lines", "done"))
    builder.cbranch(builder.icmp_signed("<", i64(_LINE), end), loop, done)

    builder.position_at_end(loop)
    at, before = builder.phi(i64), builder.phi(line)
    low, high = (builder.call(multiply, [before, factors, i8(which)]) for which in (0x00, 0x11))
    after = builder.xor(builder.xor(low, high), move(at))
    following = builder.add(at, i64(_LINE))
    for phi, start, step in ((at, i64(_LINE), following), (before, first, after)):
        phi.add_incoming(start, entry)
        phi.add_incoming(step, loop)
    builder.cbranch(builder.icmp_signed("<", following, end), loop, done)

    builder.position_at_end(done)
    folded = builder.phi(line)
    folded.add_incoming(first, entry)
    folded.add_incoming(after, loop)
    rest = i64(0)
    for word in range(8):
        rest = builder.call(take_word, [rest, builder.extract_element(folded, i32(word))])
    builder.fence(
        "seq_cst"
    )  # Streaming stores may be seen out of order: whoever is told of the copy must see all of it.
    return builder.trunc(rest, i32)


@compiled
def copy_checked(mapped, descriptor, offsets, out, rows, good):  # type: ignore[no-untyped-def]
    """out[rows[i]] = mapped[offsets[i] : offsets[i] + B], for each of n chunks that fits the 4 bytes behind it.

    mapped: uint8, the file; descriptor: the same file; offsets: int64 [n], out of range where there is nothing to copy;
    out: uint8 [m, B]; rows: int64 [n]; good: bool [n], which chunks are copied and sound. The kernel is asked for the
    pages first, as in store/mapped.py, and for those of the next chunks, so that a disk reads while they are copied.
    """
    n_bytes = out.shape[1]
    base = mapped.ctypes.data
    for i in range(offsets.size):
        offset = offsets[i]
        good[i] = False
        for ahead in range(i + _AHEAD if i else 0, min(i + _AHEAD + 1, offsets.size)):
            _fadvise(descriptor, offsets[ahead], n_bytes + 4, _WILL_NEED)
        if offset < 0 or offset > mapped.size - n_bytes - 4:
            continue
        page = offset - offset % _PAGE
        if _madvise(base + page, offset + n_bytes + 4 - page, _POPULATE_READ) != 0:
            continue
        target = out[rows[i]]
        address = target.ctypes.data
        head = min(-address % _LINE, n_bytes)
        lines = (n_bytes - head) // _LINE
        tail = head + lines * _LINE
        state = _ALL
        for at in range(head):
            byte = mapped[offset + at]
            target[at] = byte
            state = _crc_byte(state, byte)  # pyright: ignore[reportCallIssue]  numba passes its typing context itself
        if lines:
            state = _move_lines(base + offset + head, address + head, lines, state)  # pyright: ignore[reportCallIssue]
        for at in range(tail, n_bytes):
            byte = mapped[offset + at]
            target[at] = byte
            state = _crc_byte(state, byte)  # pyright: ignore[reportCallIssue]
        stored = np.uint32(0)
        for at in range(4):
            stored |= np.uint32(mapped[offset + n_bytes + at]) << np.uint32(8 * at)
        good[i] = stored == state ^ _ALL
