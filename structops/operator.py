"""The base of our operators: lean, under CoLA's ``LinearOperator``, with declared leaves and static fields.

CoLA's own constructor costs 80 us, stores the backend module on the instance (no pickling, no deepcopy), decides per
*class* which attributes are leaves, and initialises JAX for users of torch.  Here an operator is a plain object with
two lists of names, and everything else (``shape``, ``dtype``, ``device``, ``xnp``) is derived.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Number
from types import ModuleType
from typing import Any, ClassVar, Self

import numpy as np

from structops import _array, _cola
from structops._array import Array, Dtype
from structops._cola import LinearOperator
from structops.errors import BackendError, ShapeError


class StructuredOperator(LinearOperator):
    """A linear operator whose arrays and sizes are declared.

    A subclass must declare ``leaves`` (names of attributes that hold arrays, operators, or tuples of them) and
    ``static`` (names of hashable attributes), and write ``shape``, ``_matmat``, ``_rmatmat`` and ``transposed``.
    It should write ``describe``, its structure in a few words.
    """

    leaves: ClassVar[tuple[str, ...]] = ()
    static: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A plain object: CoLA's ``__new__`` looks for a device in all arguments."""
        return object.__new__(cls)

    __setattr__ = object.__setattr__  # CoLA's decides, per class and for good, which attributes are leaves

    # ------------------------------------------------------------------------------------------------- must be written

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        raise NotImplementedError

    def _matmat(self, X: Array) -> Array:
        """``A @ X`` for X of shape (in_features, k)."""
        raise NotImplementedError

    def _rmatmat(self, X: Array) -> Array:
        """``X @ A`` for X of shape (..., out_features)."""
        raise NotImplementedError

    def transposed(self) -> StructuredOperator:
        """The transpose, as the same structure and with the same arrays."""
        raise NotImplementedError

    def describe(self) -> str:
        """The sizes of the structure in a few words, for the repr."""
        return ""

    # --------------------------------------------------------------------------------------------------------- derived

    @property
    def inferred(self) -> set[type]:
        """CoLA's properties that follow from the structure, or from those of the parts; never from values."""
        return set()

    def parts(self) -> list[Any]:
        """The arrays and operators that the leaves hold, in order."""
        return list(_flat(getattr(self, name) for name in self.leaves))

    def arrays_flat(self) -> list[Array]:
        """All arrays, those of the operators among the parts included."""
        return [array for part in self.parts() for array in _arrays(part)]

    @property
    def dtype(self) -> Dtype:
        """The dtype of the matrix: that to which the parts promote."""
        return _array.promote(*(part.dtype for part in self.parts()))

    @property
    def device(self) -> Any:
        """The device of the first array."""
        return self.xnp.get_device(self.arrays_flat()[0])

    @property
    def xnp(self) -> ModuleType:
        """CoLA's functions for the library of the arrays."""
        return _cola.backend_functions(_array.backend_of(self.arrays_flat()[0]))

    @property
    def annotations(self) -> set[type]:
        """CoLA's properties (SelfAdjoint, PSD, ...): those that follow and those that were declared."""
        return {*self.inferred, *getattr(self, "_declared", ())}

    @annotations.setter
    def annotations(self, values: set[type]) -> None:
        self._declared = frozenset(values)

    @property
    def T(self) -> StructuredOperator:
        """The transpose, again of this structure; self-adjoint and unitary matrices stay so, also complex ones."""
        result = self.transposed()
        declared: frozenset[type] = getattr(self, "_declared", frozenset())
        result.annotations = {p for p in declared if issubclass(p, (_cola.SelfAdjoint, _cola.Unitary))}
        return result

    @property
    def H(self) -> StructuredOperator:
        """The adjoint (conjugate transpose), again of this structure."""
        return self.T.conj()

    def conj(self) -> Self:
        """The entrywise conjugate; the operator itself if it is real."""

        def conjugate(part: Any) -> Any:
            if not _array.is_complex(part.dtype):
                return part
            # CoLA has no conjugate of an operator.
            return part.conj() if hasattr(part, "conj") else part.H.T

        return self._map(conjugate) if _array.is_complex(self.dtype) else self

    def to(self, device: Any = None, dtype: Dtype = None) -> Self:
        """The operator on another device or with another dtype; integer arrays (indices) keep theirs.

        Args:
            device: A device of the library; a dtype is accepted in its place, as in torch.
            dtype: A floating or complex dtype.

        Raises:
            BackendError: The dtype is not floating, or would drop an imaginary part.
        """
        if device is not None and dtype is None and _array.is_floating(device):
            device, dtype = None, device
        if dtype is not None and not _array.is_floating(dtype):
            raise BackendError(f"the entries of an operator have a floating or complex dtype, got {dtype}")
        return self._converted(device, dtype)

    def _converted(self, device: Any, dtype: Dtype) -> Self:
        return self._map(lambda part: converted(part, device, dtype))

    def to_dense(self) -> Array:
        """The matrix as one contiguous array of shape (out_features, in_features)."""
        rows, cols = self.shape
        one = _array.eye(min(rows, cols), self.arrays_flat()[0], self.dtype)
        return _array.contiguous(self._rmatmat(one) if rows <= cols else self._matmat(one))

    # -------------------------------------------------------------------------------------------------------- products

    def __matmul__(self, X: Any) -> Any:
        """``A @ X`` for an operator, a vector (in_features,) or a matrix (in_features, k)."""
        self._check_library(X)
        if isinstance(X, LinearOperator):
            return _cola.dot(self, X)
        if X.ndim not in (1, 2):
            raise ShapeError(
                f"A @ X takes X of shape ({self.shape[1]},) or ({self.shape[1]}, k), got {tuple(X.shape)}; "
                f"with leading batch axes, features last, use X @ A.T"
            )
        if X.shape[0] != self.shape[1]:
            raise ShapeError(f"A @ X: A is {self!r}, so X must have {self.shape[1]} rows, got shape {tuple(X.shape)}")
        return self._matmat(X.reshape((-1, 1))).reshape((-1,)) if X.ndim == 1 else self._matmat(X)

    def __rmatmul__(self, X: Any) -> Any:
        """``X @ A`` for an operator or an array of shape (..., out_features)."""
        self._check_library(X)
        if isinstance(X, LinearOperator):
            return _cola.dot(X, self)
        if X.ndim < 1 or X.shape[-1] != self.shape[0]:
            raise ShapeError(
                f"X @ A: A is {self!r}, so the last axis of X must be {self.shape[0]}, got shape {tuple(X.shape)}"
            )
        return self._rmatmat(X)

    def __add__(self, other: Any) -> Any:
        """``A + B`` for an operator or a matrix of the same shape, lazily; ``A + 0`` is A, so that ``sum`` works."""
        if isinstance(other, Number) and other == 0:
            return self
        self._check_library(other)
        if not isinstance(other, LinearOperator) and tuple(other.shape) != self.shape:
            raise ShapeError(f"cannot add {self!r} and a matrix of shape {tuple(other.shape)}")
        return _cola.add(self, other)

    def __mul__(self, c: Any) -> Any:
        """``c * A`` for a number or an array of no axes, lazily."""
        if getattr(c, "ndim", 0):
            raise ShapeError(
                f"c * A takes a number, got shape {tuple(c.shape)}; row by row that is cola.ops.Diagonal(c) @ A, "
                f"column by column A @ cola.ops.Diagonal(c)"
            )
        return _cola.mul(self, c)

    def _check_library(self, X: Any) -> None:
        theirs = X.xnp if isinstance(X, LinearOperator) else _cola.backend_functions(_array.backend_of(X))
        if theirs is not self.xnp:
            mine, other = (xnp.__name__.rpartition(".")[2].removesuffix("_fns") for xnp in (self.xnp, theirs))
            raise BackendError(f"{self!r} holds {mine} arrays, the other side {other} arrays; convert one of them")

    def __getitem__(self, ids: Any) -> Any:
        """``A[i]``, ``A[i, :]``, ``A[:, j]``, ``A[i, j]`` as arrays; slices as a lazy CoLA ``Sliced``."""
        rows, cols = ids if isinstance(ids, tuple) else (ids, slice(None))
        for axis, index in enumerate((rows, cols)):  # JAX would take the nearest index that there is
            if isinstance(index, Integral) and not -self.shape[axis] <= int(index) < self.shape[axis]:
                raise IndexError(f"index {index} is out of range for axis {axis} of size {self.shape[axis]}")
        if isinstance(rows, Integral):
            return (self._unit(rows, 0) @ self)[cols]
        if isinstance(cols, Integral):
            return (self @ self._unit(cols, 1))[rows]
        if isinstance(rows, list) and isinstance(cols, list):
            entries = [self[i, j] for i, j in zip(rows, cols, strict=True)]
            return _array.namespace(self.arrays_flat()[0]).stack(entries)
        if not isinstance(rows, slice) or not isinstance(cols, slice):
            raise IndexError(f"expected A[i], A[i, j], A[:, j], A[a:b, c:d] or A[[i, ...], [j, ...]], got A[{ids!r}]")
        return _cola.Sliced(A=self, slices=(rows, cols))

    def _unit(self, index: Integral, axis: int) -> Array:
        size = self.shape[axis]
        return self.xnp.canonical(loc=int(index) % size, shape=(size,), dtype=self.dtype, device=self.device)

    # --------------------------------------------------------------------------------------------------------- pytrees

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Children and static data of the pytree."""
        children = tuple(getattr(self, name) for name in self.leaves)
        return children, (tuple(getattr(self, name) for name in self.static), getattr(self, "_declared", frozenset()))

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: Sequence[Any]) -> Self:
        """The operator with other leaves; nothing is checked, since leaves may be tracers or placeholders."""
        operator = object.__new__(cls)
        values, declared = aux
        for name, value in zip((*cls.leaves, *cls.static), (*children, *values), strict=True):
            object.__setattr__(operator, name, value)
        if declared:
            operator._declared = declared
        return operator

    def _map(self, function: Any) -> Self:
        """The operator with ``function`` applied to every array and operator that it holds."""
        children, aux = self.tree_flatten()
        return self.tree_unflatten(aux, [_map(child, function) for child in children])

    def with_leaves(self, *children: Any) -> Self:
        """The same operator with other arrays or operators, and without the properties that were declared."""
        _, (values, _) = self.tree_flatten()
        return self.tree_unflatten((values, frozenset()), children)

    def __repr__(self) -> str:
        """One line: structure, shape, sizes, parameters and their ratio to dense, dtype."""
        rows, cols = self.shape
        described = self.describe()
        count = sum(self.parameter_counts().values())
        ratio = f"{count:,} params, {count / (rows * cols):.3g} of dense"
        return f"{type(self).__name__}({rows}x{cols}; {described + '; ' if described else ''}{ratio}; {self.dtype})"

    __str__ = __repr__  # CoLA's is the bare name of the class

    def parameter_counts(self) -> dict[int, int]:
        """Parameters of every distinct array, by the array's identity, so that shared arrays are counted once."""
        return {id(array): math.prod(array.shape) for array in self.arrays_flat()}


def check_arrays(what: str, arrays: Sequence[Array]) -> None:
    """All arrays come from the same library.

    Raises:
        BackendError: numpy arrays, other objects, or a mixture.
    """
    if not arrays:
        raise ShapeError(f"{what} needs at least one array, got none")
    backends = {_array.backend_of(array) for array in arrays}
    if len(backends) > 1:
        raise BackendError(f"{what}: expected arrays of one library, got {' and '.join(sorted(backends))}")


def check_axes(what: str, array: Array, *axes: str) -> None:
    """``array`` has the axes that are named, such as ``"(rank, in)"``, in one of several ways, and is not empty.

    Raises:
        ShapeError: It has another number of axes, or one of size 0.
    """
    if array.ndim not in [names.count(",") + 1 for names in axes] or 0 in array.shape:
        raise ShapeError(f"{what} must have shape {' or '.join(axes)} of sizes from 1 on, got {tuple(array.shape)}")


def check_precision(what: str, dtype: Dtype) -> None:
    """Linear algebra needs at least 32 bits.

    Raises:
        BackendError: The dtype has 16.
    """
    if _array.is_half(dtype):
        raise BackendError(f"{what} needs float32 or more, got {dtype}; convert the operator with .to(dtype=...)")


def kind_of(A: LinearOperator) -> str:
    """The name of an operator's class without the types of its parts, which CoLA's names hold."""
    return type(A).__name__.partition("[")[0]


def apply_left(M: LinearOperator, X: Array) -> Array:
    """``X @ M`` for X of shape (..., rows of M), also for an operator of CoLA, which takes matrices alone."""
    if isinstance(M, StructuredOperator):
        return M._rmatmat(X)
    return M._rmatmat(X.reshape((-1, M.shape[0]))).reshape((*X.shape[:-1], M.shape[1]))


def promoted_parts(Ms: Sequence[Any], *, every: bool = False) -> tuple[Any, ...]:
    """Operators that are to be applied together: those of CoLA, which do not promote, in the dtype of the whole.

    Args:
        Ms: The operators.
        every: Whether ours are converted, too, since their arrays are to be multiplied.
    """
    keep = () if every else StructuredOperator
    return tuple(M if isinstance(M, keep) else promoted(M, Ms) for M in Ms)


def promoted(A: Any, operators: Sequence[Any]) -> Any:
    """A result in the dtype to which the operators promote that it was made of; identities and zeros count, too."""
    dtype = _array.promote(*(M.dtype for M in operators))
    return A if A.dtype == dtype else converted(A, None, dtype)


def converted(part: Any, device: Any, dtype: Dtype) -> Any:
    """An array or an operator on another device or in another dtype; integer arrays (indices) keep theirs.

    Raises:
        BackendError: The dtype would drop an imaginary part.
    """
    if isinstance(part, StructuredOperator):
        return part.to(device, dtype)
    if isinstance(part, LinearOperator):
        leaves, unflatten = part.flatten()
        result = unflatten([converted(leaf, device, dtype) if _array.is_array(leaf) else leaf for leaf in leaves])
        if dtype is not None:
            _declare(result, dtype)
        return result
    if dtype is not None and _array.is_floating(part.dtype):
        if _array.is_complex(part.dtype) and not _array.is_complex(dtype):
            raise BackendError(f"{part.dtype} to {dtype} would drop the imaginary part; take the real part first")
        part = _array.cast(part, dtype)
    return part if device is None else _array.move(part, device)


def _declare(part: Any, dtype: Dtype) -> None:
    """Tell an operator of CoLA, and those that it holds, which dtype it has; it would keep the old one."""
    if isinstance(part, tuple | list):
        for item in part:
            _declare(item, dtype)
    elif isinstance(part, LinearOperator) and not isinstance(part, StructuredOperator):
        part.dtype = dtype
        for value in vars(part).values():
            _declare(value, dtype)


def _flat(items: Any) -> Any:
    for item in items:
        if isinstance(item, tuple):
            yield from _flat(item)
        else:
            yield item


def _arrays(part: Any) -> list[Array]:
    if isinstance(part, StructuredOperator):
        return part.arrays_flat()
    if isinstance(part, LinearOperator):
        return [leaf for leaf in part.flatten()[0] if _array.is_array(leaf)]
    return [part]


def _map(item: Any, function: Any) -> Any:
    return tuple(_map(part, function) for part in item) if isinstance(item, tuple) else function(item)


@_cola.transpose.dispatch(precedence=1)
def transpose_structured(A: StructuredOperator) -> LinearOperator:
    """The transpose of every structure is that structure again."""
    return A.T


@_cola.adjoint.dispatch(precedence=1)
def adjoint_structured(A: StructuredOperator) -> LinearOperator:
    """The adjoint of every structure is that structure again."""
    return A.H


@_cola.kron.dispatch
def kron_left_numpy(A: np.ndarray, B: StructuredOperator) -> LinearOperator:
    """CoLA would make it a JAX array."""
    raise _array.foreign(A)


@_cola.kron.dispatch
def kron_right_numpy(A: StructuredOperator, B: np.ndarray) -> LinearOperator:
    """CoLA would make it a JAX array."""
    raise _array.foreign(B)
