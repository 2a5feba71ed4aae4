"""What the Hopper kernel does within the registers of a warpgroup: layouts, weights as pairs of 16 bits, row sums.

`steps.softmax_step` is not used: its row sum crosses the lanes of a warp in every tile, where `add_columns` keeps each
thread's share apart until the end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false


@gluon.constexpr_function
def accumulator_layout(columns):
    """Layout of [rows, columns] as a warpgroup's product leaves it in registers."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def pack(b_p, dtype: gl.constexpr):
    """[rows, BN] fp32 -> [rows, BN / 2] int32, pairs of 16 bits of `dtype`."""
    # a loop that carries them apart shuffles bytes in every pass
    b_even, b_odd = b_p.reshape([b_p.shape[0], b_p.shape[1] // 2, 2]).split()
    instruction: gl.constexpr = (
        "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    )
    return gl.inline_asm_elementwise(instruction, "=r,r,r", [b_even, b_odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(b_pairs, dtype: gl.constexpr):
    """[rows, BN / 2] pairs of 16 bits -> [rows, BN] of `dtype`: undoes `pack`."""
    b_even, b_odd = (b_pairs & 0xFFFF).to(gl.int16), (b_pairs >> 16).to(gl.int16)
    return gl.join(b_even, b_odd).reshape([b_pairs.shape[0], 2 * b_pairs.shape[1]]).to(dtype, bitcast=True)


@gluon.constexpr_function
def halves_layout(rows, columns):
    """accumulator_layout(2 * columns) of [rows, columns, 2], the two halves side by side in a thread's registers."""
    far = [[0, 2**bit, 0] for bit in range(3, columns.bit_length() - 1)]
    registers = [[0, 0, 1], [0, 1, 0], [8, 0, 0], *far]
    lanes = [[0, 2, 0], [0, 4, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, columns, 2])


@gluon.jit
def halves(b_x):
    """[rows, n] -> twice [rows, n / 2]."""
    ROWS: gl.constexpr = b_x.shape[0]
    HALF: gl.constexpr = b_x.shape[1] // 2
    b_x = b_x.reshape([ROWS, 2, HALF]).permute([0, 2, 1])
    return gl.convert_layout(b_x, halves_layout(ROWS, HALF)).split()


@gluon.jit
def add_columns(b_sum, b_p, b_gate, GATE: gl.constexpr):
    """[rows, 8] += the columns of b_p [rows, n], 8 at a time, times b_gate [rows, n] where GATE is POST_EXP (2).

    A chain of FMAs in each thread, where gl.sum makes a tree.
    """
    if b_p.shape[1] > 8:
        b_p0, b_p1 = halves(b_p)
        b_gate0, b_gate1 = halves(b_gate) if GATE == 2 else (b_gate, b_gate)
        b_sum = add_columns(b_sum, b_p0, b_gate0, GATE)
        b_sum = add_columns(b_sum, b_p1, b_gate1, GATE)
    else:
        b_p = gl.convert_layout(b_p, accumulator_layout(8))
        b_sum = b_sum + (b_p * gl.convert_layout(b_gate, accumulator_layout(8)) if GATE == 2 else b_p)
    return b_sum
