"""A workaround for a fault of torch on CPUs: a function's first call in a process must not be made by several threads.

torch hands sqrt, exp, tanh and the like to oneMKL, which looks for the fastest code on the first call of each function.
Where several threads make that call at once, one of them may run code of lower precision: its share of the tensor then
has relative errors up to 3e-4, once, in about one process of a thousand (issue 188792 of pytorch). Seen here: a run of
training that differed from an identical one after the first step. A call with a single number runs in one thread, and
makes all later calls safe.

torch is an argument, because this package does not import it. The modules through which all work with torch goes call
it when they are imported, so that workers do too.
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
