"""Elementary functions that give the same bits in every call, the first one included.

PyTorch computes cos, exp and the like with MKL's vector functions on CPUs, and MKL chooses a kernel for each of them in
its first call. When that call runs on several threads at once, one of them can take a kernel of lower accuracy (errors of
1e-4) for its part: in one of ten processes the first forward pass of a model then differs from all later ones
(pytorch/pytorch issue 188792). So each function is called once on one thread before anything depends on it.
"""

from functools import cache

import torch

FUNCTIONS = (
    torch.acos, torch.asin, torch.atan, torch.cos, torch.erf, torch.erfc, torch.erfinv, torch.exp, torch.expm1,
    torch.lgamma, torch.log, torch.log10, torch.log1p, torch.log2, torch.rsqrt, torch.sigmoid, torch.sin, torch.sqrt,
    torch.tan, torch.tanh, torch.trunc,
)  # fmt: skip


@cache
def settle_vector_math() -> None:
    """Have the kernels chosen, once a process. So few numbers are never shared out to several threads."""
    for dtype in (torch.float32, torch.float64):
        numbers = torch.full((16,), 0.5, dtype=dtype)
        for function in FUNCTIONS:
            function(numbers)
