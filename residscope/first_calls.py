"""A fault of torch's on CPUs, gone round: no function's first call in a process may be made by several threads at once.

torch hands sqrt, exp, tanh and the like to oneMKL, which looks for the fastest code on the first call of each function.
Where several threads make that call at once, one of them may run code of lower precision: its share of the tensor then
has relative errors up to 3e-4, once, in about one process of a thousand (issue 188792 of pytorch). Seen here: a run of
training that left the path of its twin in the first step. A single number is computed by a single thread, so a call
with one number makes all later ones safe.

torch is an argument: this package does not import it. The modules through which all work with torch goes call it when
they load, so that workers do too.
"""

from typing import Any

FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "lgamma", "log", "log10"),
    *("log1p", "log2", "reciprocal", "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh"),
)
"""What oneMKL has, and what is made of it."""


def settle_first_calls(torch: Any) -> None:
    """Call each of `FUNCTIONS` with one number of each type; a few hundred microseconds."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(number)
