"""structops: structured matrices as composable linear operators, on torch and JAX.

    import structops as so

    A = so.Kron(B, C)                        # operators: LowRank, Kron, TT, BTT, Monarch, Circulant, ...
    A @ x, A.T, A @ A.T, 2 * A + B           # CoLA's algebra
    so.num_params(A), so.macs(A)             # counts of any expression
    spec = so.structure("btt(rank=2)")       # a structure without a size
    so.mup.scales(spec.chain(1024, 4096))    # init and learning rate of every factor

Layers are in ``structops.torch`` and ``structops.jax``.

The names are listed in ``__init__.pyi`` and loaded on first use: CoLA imports torch and JAX, which takes seconds, and
``structops --help`` needs neither.
"""

import lazy_loader

from structops.contract import contract as contract  # at once: a module of the same name would hide the function

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
