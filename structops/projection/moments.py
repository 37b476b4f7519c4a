"""Running first and second moments of the inputs of a layer: what a projection needs of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from structops import _array
from structops._array import Array
from structops.errors import BackendError, EntryError, ShapeError
from structops.operator import StructuredOperator
from structops.projection.solving import runs, working

NAMES = ("count", "mean", "spread")


class Moments:
    r"""Count, mean and second moments of vectors that come batch by batch.

    **Definition.** For vectors x with weights w: the count \(\sum w\), the mean \(\mu = \sum w x / \sum w\), the second
    moments \(C = \sum w x x^H / \sum w\), and the centred ones \(C - \mu \mu^H\).

    What is kept is \(\sum w (x - \mu)(x - \mu)^H\), with the mean so far, after Chan, Golub and LeVeque: a mean that is
    large next to the spread of the inputs costs no digits, as it would in a difference of large sums.

    Args:
        count: Sum of the weights, a scalar array.
        mean: Shape (features,).
        spread: Sum of the centred products, shape (features, features).

    Raises:
        ShapeError: The shapes do not fit together.
        BackendError: No torch or JAX arrays, a mixture, or no floating-point numbers.

    **Shapes.** ``add`` takes (..., features); leading axes are tokens.

    **Cost.** features^2 per token, and one array of features^2 numbers, updated in place in torch.  Tokens are cast and
    centred in chunks.

    **Numerics.** Sums in float32, for inputs of 64 bits in 64; the count in double precision where there is one.

    **References.** Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).

    Example:
        >>> import torch
        >>> inputs = Moments.zeros(2, like=torch.empty(0))
        >>> layer = torch.nn.Linear(2, 3)
        >>> hook = layer.register_forward_pre_hook(lambda layer, args: inputs.add(args[0]) and None)
        >>> _ = layer(torch.tensor([[[1., 2.], [3., 2.]]]))
        >>> inputs
        Moments(2 features, 2 vectors; torch.float32)
        >>> inputs.mean.tolist(), inputs.covariance.tolist(), inputs.centred.tolist()
        ([2.0, 2.0], [[5.0, 4.0], [4.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, count: Array, mean: Array, spread: Array) -> None:
        libraries = {_array.backend_of(array) for array in (count, mean, spread)}
        if len(libraries) > 1:
            raise BackendError(f"Moments: expected arrays of one library, got {' and '.join(sorted(libraries))}")
        if not _array.is_floating(spread.dtype):
            raise BackendError(f"Moments: expected floating-point numbers, got {spread.dtype}")
        features = tuple(mean.shape)
        if len(features) != 1 or tuple(spread.shape) != features * 2 or tuple(count.shape) != ():
            raise ShapeError(
                f"Moments: expected a count (), a mean (features,) and a spread (features, features), "
                f"got {tuple(count.shape)}, {features} and {tuple(spread.shape)}"
            )
        self.count, self._mean, self._spread = count, mean, spread

    @classmethod
    def zeros(cls, features: int, like: Array) -> Self:
        """Of no vectors yet.

        Args:
            features: Length of the vectors.
            like: An array of the library and device of the sums, and of the dtype of the vectors.

        Raises:
            ShapeError: ``features`` is no positive whole number.
            BackendError: ``like`` is no torch or JAX array, or not of floating-point numbers.
        """
        if isinstance(features, bool) or not isinstance(features, int) or features < 1:
            raise ShapeError(f"Moments: features must be a whole number of at least 1, got {features!r}")
        _array.backend_of(like)
        if not _array.is_floating(like.dtype):
            raise BackendError(f"Moments: expected vectors of floating-point numbers, got {like.dtype}")
        dtype = working(like)
        real = _array.zeros((), like, _array.real_of(dtype))
        count = _array.cast(real, _array.wide(real))
        return cls(count, _array.zeros((features,), like, dtype), _array.zeros((features, features), like, dtype))

    @property
    def features(self) -> int:
        """Length of the vectors."""
        return int(self._mean.shape[0])

    def add(self, x: Array, weights: Array | None = None) -> Self:
        """Count more vectors; without gradients, so that a forward hook may call it.

        Args:
            x: Shape (..., features); cast to the dtype and moved to the device of the sums.
            weights: One nonnegative number a vector, or a mask of those that count, shape ``x.shape[:-1]``.  What a
                vector of weight 0 holds does not matter.

        Returns:
            These moments.

        Raises:
            ShapeError: ``x`` or ``weights`` has another shape.
            BackendError: Another library, or real sums of complex vectors.
        """
        x = self._own("x", x)
        if tuple(x.shape[-1:]) != (self.features,):
            raise ShapeError(f"Moments: expected x of shape (..., {self.features}), got {tuple(x.shape)}")
        if _array.is_complex(x.dtype) and not _array.is_complex(self._spread.dtype):
            raise BackendError(f"Moments: the sums are of {self._spread.dtype}, got x of {x.dtype}")
        rows = x.reshape((-1, self.features))
        if weights is not None:
            if tuple(weights.shape) != tuple(x.shape[:-1]):
                raise ShapeError(
                    f"Moments: expected weights of shape {tuple(x.shape[:-1])} for x {tuple(x.shape)}, "
                    f"got {tuple(weights.shape)}"
                )
            weights = self._own("weights", weights).reshape((-1,))
        for part in runs(int(rows.shape[0]), self.features):
            self._add(rows[part], None if weights is None else weights[part])
        return self

    def _own(self, name: str, array: Array) -> Array:
        """Of the library and on the device of the sums, without gradients.

        Raises:
            BackendError: Of another library.
        """
        library = _array.backend_of(self._spread)
        if _array.backend_of(array) != library:
            raise BackendError(f"Moments of {library} arrays: got {name} of {_array.backend_of(array)}")
        return array.detach().to(self._spread.device) if hasattr(array, "detach") else array

    def _add(self, rows: Array, weights: Array | None) -> None:
        xp, real = _array.namespace(rows), _array.real_of(self._spread.dtype)
        rows = _array.cast(rows, self._spread.dtype)
        if weights is None:
            count = _array.ones((), self.count) * int(rows.shape[0])
            mean = rows.mean(0)
            rows = rows - mean
        else:
            shares = _array.cast(weights, real)[:, None]
            rows = xp.where(shares > 0, rows, xp.zeros_like(rows))
            count = _array.cast(shares, self.count.dtype).sum()
            mean = (rows * shares).sum(0) / _array.cast(_positive(count), real)
            rows = (rows - mean) * xp.sqrt(shares)
        self._include(count, mean, rows)

    def _include(self, count: Array, mean: Array, rows: Array) -> None:
        """More vectors, given by their count, their mean, and rows whose products sum up to their spread."""
        xp, total = _array.namespace(rows), self.count + count
        share = _array.cast(count / _positive(total), _array.real_of(rows.dtype))
        step = mean - self._mean
        between = step * xp.sqrt(share * _array.cast(self.count, share.dtype))
        self.count, self._mean = total, self._mean + share * step
        for part in (rows, between[None]):
            if hasattr(self._spread, "addmm_"):  # in place
                self._spread.addmm_(part.mT, part.conj())
            else:
                self._spread = self._spread + part.mT @ xp.conj(part)

    def __add__(self, other: Moments) -> Moments:
        """Those of the vectors of both, for the parts of a distributed run."""
        if not isinstance(other, Moments):
            return NotImplemented
        if self.features != other.features:
            raise ShapeError(f"Moments of {self.features} and of {other.features} features do not add up")
        if self._spread.dtype != other._spread.dtype:
            raise BackendError(f"Moments of {self._spread.dtype} and of {other._spread.dtype} do not add up")
        self._own("moments", other._spread)
        mean, spread, count = (_array.move(a, self._spread.device) for a in (other._mean, other._spread, other.count))
        result = type(self)(self.count, self._mean, self._spread + spread)
        result._include(count, mean, result._spread[:0])
        return result

    @property
    def mean(self) -> Array:
        """The mean, shape (features,).

        Raises:
            EntryError: No vector has been counted.
        """
        self._check_count()
        return self._mean

    @property
    def centred(self) -> Array:
        """Second moments about the mean, shape (features, features): for a layer whose bias makes up for the mean.

        Raises:
            EntryError: No vector has been counted.
        """
        self._check_count()
        return self._spread / _array.cast(self.count, self._spread.dtype)

    @property
    def covariance(self) -> Array:
        """Second moments, shape (features, features): the ``covariance`` of `project` and `fit`.

        Raises:
            EntryError: No vector has been counted.
        """
        mean, moments = self.mean, self.centred
        moments += mean[:, None] * _array.namespace(mean).conj(mean)[None, :]
        return moments

    def _check_count(self) -> None:
        if _array.is_concrete(self.count) and not float(self.count) > 0:
            raise EntryError("these moments have counted no vector yet, or only such of weight 0")

    def arrays(self) -> dict[str, Array]:
        """What there is to store, as a flat dict: ``count``, ``mean`` and ``spread``; `from_arrays` reads it."""
        return {"count": self.count, "mean": self._mean, "spread": self._spread}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Self:
        """The moments that `arrays` gave.

        Raises:
            ShapeError: Names are missing or unknown, or the shapes do not fit together.
            BackendError: No torch or JAX arrays, or a mixture.
        """
        if set(arrays) != set(NAMES):
            raise ShapeError(f"Moments: expected the arrays {', '.join(NAMES)}, got {', '.join(sorted(arrays))}")
        return cls(*(arrays[name] for name in NAMES))

    def __repr__(self) -> str:
        """Size, count and dtype."""
        count = f"{float(self.count):g}" if _array.is_concrete(self.count) else "?"
        return f"Moments({self.features} features, {count} vectors; {self._spread.dtype})"


def _positive(count: Array) -> Array:
    """The count, 1 in place of 0."""
    xp = _array.namespace(count)
    return xp.where(count > 0, count, xp.ones_like(count))


def bias_shift(W: Array, operator: StructuredOperator, mean: Array) -> Array:
    r"""What to add to the bias of a layer whose matrix W becomes an operator A: \((W - A)\,\mu\).

    **Definition.** With \(\mu = E[x]\), the error of \(A x + b + (W - A)\mu\) against \(W x + b\) is
    \(E\|(W - A)(x - \mu)\|^2\): the projection to go with it is that of the centred moments,
    ``fit(W, spec, covariance=moments.centred)``.

    Args:
        W: Shape (out_features, in_features).
        operator: A, of the same shape.
        mean: Mean of the inputs, shape (in_features,).

    Returns:
        Shape (out_features,), in the dtype of W.

    Raises:
        ShapeError: The shapes do not fit together.
        BackendError: Arrays of two libraries.

    **Cost.** Two products with one vector.

    **Numerics.** In double precision; a W of 16 or 32 bits is cast in pieces.

    **References.** An et al., "FLAP" (arXiv 2312.11983), do the same for inputs that are pruned.

    Example:
        >>> import torch
        >>> import structops as so
        >>> W = torch.tensor([[1., 2.], [3., 4.]])
        >>> bias_shift(W, so.project(W, "block_diag(blocks=2)"), torch.tensor([1., 10.]))
        tensor([20.,  3.])
    """
    libraries = {_array.backend_of(array) for array in (W, mean, *operator.arrays_flat())}
    if len(libraries) > 1:
        raise BackendError(
            f"expected W, the operator and the mean of one library, got {' and '.join(sorted(libraries))}"
        )
    if tuple(W.shape) != tuple(operator.shape) or tuple(mean.shape) != tuple(W.shape[1:]):
        raise ShapeError(
            f"expected W and an operator of one shape (out, in) and a mean (in,), "
            f"got {tuple(W.shape)}, {tuple(operator.shape)} and {tuple(mean.shape)}"
        )
    W, mean = (array.detach() if hasattr(array, "detach") else array for array in (W, mean))
    mu = _array.cast(_array.move(mean, W.device), _array.wide(W))
    parts = [_array.cast(W[part], mu.dtype) @ mu for part in runs(int(W.shape[0]), int(W.shape[1]))]
    shift = _array.namespace(W).concat(parts) - operator @ mu
    return _array.cast(shift.detach() if hasattr(shift, "detach") else shift, W.dtype)
