"""A workaround for a bug of torch on CPUs: the first call of a function in a process must be made in a single thread.

torch passes sqrt, exp, tanh and the like to oneMKL, which selects the fastest code at the first call of each function.
If several threads make that call at once, one of them may run code of lower precision: its share of the tensor then
has relative errors up to 3e-4, once, in about one process in a thousand (pytorch issue 188792). We have seen a
training run differ from an identical one after the first step. A call with a single number runs in one thread, and
makes all later calls safe.

torch is an argument, because this package does not import it. The modules that all work with torch goes through call
this function when they are imported, so that workers do too.
"""

from typing import Any

FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "lgamma", "log", "log10"),
    *("log1p", "log2", "reciprocal", "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh"),
)
"""The functions of oneMKL, and those that torch builds from them."""


def settle_first_calls(torch: Any) -> None:
    """Call each of `FUNCTIONS` with one number of each type; a few hundred microseconds."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(number)
