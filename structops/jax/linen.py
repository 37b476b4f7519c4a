"""Flax Linen: run a model on parameters in which kernels were replaced by factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen

from structops.errors import StructureError
from structops.jax.linear import affine
from structops.jax.weights import Specs
from structops.spec import Plan


def linen_interceptor(specs: Specs) -> Callable[..., Any]:
    """What ``flax.linen.intercept_methods`` takes, so that a model runs on what `structurize` made of its parameters.

    Every ``linen.Dense`` whose parameters have a list ``factors`` computes with it; all else runs as it is.

    Args:
        specs: What `structurize` returned for ``variables["params"]``.

    Returns:
        The interceptor.

    Raises:
        StructureError: In a call, a layer has factors and no plan.

    Example:
        >>> import jax
        >>> from structops.jax import structurize
        >>> model, x = linen.Dense(16), jax.numpy.ones((3, 16))
        >>> params, specs = structurize(model.init(jax.random.key(0), x)["params"], "btt")
        >>> with linen.intercept_methods(linen_interceptor(specs)):
        ...     y = model.apply({"params": params}, x)
        >>> y.shape
        (3, 16)
    """

    def intercept(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if not isinstance(module, linen.Dense) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        params = module.variables.get("params", {})
        if "factors" not in params:
            return next_fun(*args, **kwargs)
        name = ".".join((*module.path, "factors"))
        plan = specs.get(name)
        if not isinstance(plan, Plan):
            raise StructureError(f"specs has no plan for {name!r}; give the specs that structurize returned")
        (x,) = args or tuple(kwargs.values())
        return affine(plan, list(params["factors"]), params.get("bias"), x, module.dtype)

    return intercept
