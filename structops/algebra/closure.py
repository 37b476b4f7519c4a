"""The closure table: which structure a verb makes of which, as data; ``tests/test_closure.py`` asserts every cell.

A cell holds for operators whose sizes fit: modes that agree, blocks of equal shapes, one padding, as those of
`structops.testing.representatives`.  Where they do not fit, the result is the lazy one.

    closure("@", "Kron", "TT")    # "TT"
    closure("+", "Dense", "TT")   # "Sum": no common structure, so the sum stays one
    closure("T", "BTT")           # "BTT"
"""

from __future__ import annotations

ROWS = (
    *("Dense", "LowRank", "Kron", "TT", "BTT", "Monarch", "BlockDiag", "BLAST", "Einsum"),
    *("Circulant", "Toeplitz", "Convolution", "Permutation", "Diagonal", "Identity", "Zero", "ScalarMul"),
)

# Those that a diagonal matrix goes into, since one of their factors touches all output or input labels.
_TAKE_DIAGONALS = "Dense BTT Monarch BlockDiag BLAST Einsum Diagonal"
_MULTIPLES = "Identity ScalarMul"

# For two operators: (names of the left, names of the right) and the structure of the result, "left" and "right" for
# that of a side and "*" for any.  The first line that matches counts.
BINARY: dict[str, dict[tuple[str, str], str]] = {
    "@": {
        ("Zero", "*"): "Zero",
        ("*", "Zero"): "Zero",
        ("*", "Identity"): "left",
        ("Identity", "*"): "right",
        ("LowRank", "*"): "LowRank",
        ("*", "LowRank"): "LowRank",
        ("Permutation", "ScalarMul"): "Product",  # entries other than 0 and 1
        ("ScalarMul", "Permutation"): "Product",
        ("*", "ScalarMul"): "left",
        ("ScalarMul", "*"): "right",
        ("Permutation", "Permutation Dense"): "right",
        ("Dense", "Permutation"): "Dense",
        ("Diagonal", _TAKE_DIAGONALS): "right",
        (_TAKE_DIAGONALS, "Diagonal"): "left",
        ("Kron", "Kron"): "Kron",
        ("Kron TT", "Kron TT"): "TT",  # ranks multiply
        ("BlockDiag", "BlockDiag"): "BlockDiag",
        ("Circulant", "Circulant"): "Circulant",
        ("*", "*"): "Product",
    },
    "+": {
        ("*", "Zero"): "left",
        ("Zero", "*"): "right",
        ("Diagonal Circulant Toeplitz", _MULTIPLES): "left",
        (_MULTIPLES, "Diagonal Circulant Toeplitz"): "right",
        (_MULTIPLES, _MULTIPLES): "ScalarMul",
        ("Circulant", "Circulant"): "Circulant",
        ("Circulant Toeplitz", "Circulant Toeplitz"): "Toeplitz",
        ("Kron TT", "Kron TT"): "TT",  # ranks add up
        **{(name, name): name for name in ("Dense", "LowRank", "BTT", "Monarch", "BlockDiag", "BLAST")},
        **{(name, name): name for name in ("Convolution", "Diagonal")},  # an Einsum only if it has bonds
        ("*", "*"): "Sum",
    },
    "kron": {
        ("Zero", "*"): "Zero",
        ("*", "Zero"): "Zero",
        **{(name, name): name for name in ("TT", "Permutation", "Diagonal", "Identity")},
        ("*", "*"): "Kron",
    },
}

# For one operator: its names and the structure of the result, "same" for its own.
UNARY: dict[str, dict[str, str]] = {
    "T": {"*": "same"},
    "H": {"*": "same"},
    "c *": {"Permutation": "Product", _MULTIPLES: "ScalarMul", "*": "same"},
}

# What linear algebra finds in the structure of one square operator: "same", the name of another structure, or
#   direct    numbers, or vectors as an operator, without iterating and without the matrix
#   dense     the matrix is built; ``svd`` warns
#   CoLA      no rule: LU, Cholesky, CG, GMRES, Arnoldi or Lanczos, as CoLA chooses
#   singular  an error, or a determinant of 0: there is no inverse whatever the numbers are
#   error     there is no such thing
# BTT, Monarch and Einsum are meant with square blocks for the inverse and the determinant, and with equal modes of
# input and output for diagonal and trace; Kron and BlockDiag with square parts; sqrt of Kron with positive ones.
_EXACT = "Permutation Diagonal Identity ScalarMul"
_SQUARE = "Kron BTT Monarch BlockDiag Einsum"
LINALG: dict[str, dict[str, str]] = {
    "inv": {f"{_SQUARE} Circulant {_EXACT}": "same", "LowRank Zero": "singular", "*": "CoLA"},
    "pinv": {f"LowRank Kron BlockDiag Circulant {_EXACT} Zero": "same", "*": "CoLA"},
    "slogdet": {f"Dense {_SQUARE} Circulant {_EXACT}": "direct", "LowRank Zero": "singular", "*": "CoLA"},
    "trace": {"Convolution": "CoLA", "*": "direct"},
    "diag": {"Convolution": "CoLA", "*": "direct"},
    "eig": {"Kron BlockDiag Circulant Diagonal Identity ScalarMul Zero": "direct", "*": "CoLA"},
    "svd": {f"LowRank Kron BlockDiag Circulant {_EXACT} Zero": "direct", "*": "dense"},
    "exp": {
        "BlockDiag Circulant Diagonal": "same",
        "Identity ScalarMul Zero": "ScalarMul",
        "Kron": "Product",  # of the eigenvectors, a diagonal, and their inverse
        "*": "CoLA",
    },
    "sqrt": {"Kron BlockDiag Circulant Diagonal": "same", "Identity ScalarMul Zero": "ScalarMul", "*": "CoLA"},
    "round": {"LowRank TT BTT Monarch Einsum": "same", "*": "error"},
}


def closure(verb: str, left: str, right: str | None = None) -> str:
    """The name of the structure that a verb makes.

    Args:
        verb: A key of ``BINARY``, of ``UNARY`` or of ``LINALG``.
        left: The name of the operator, or of the one on the left.
        right: The name of the one on the right, if the verb takes two.

    Raises:
        KeyError: There is no such verb, or no line for these names.
    """
    if right is None:
        results = (result for names, result in (UNARY | LINALG)[verb].items() if _among(left, names))
    else:
        results = (
            result for names, result in BINARY[verb].items() if _among(left, names[0]) and _among(right, names[1])
        )
    result = next(results, None)
    if result is None:
        raise KeyError(f"the closure table has no line for {verb} of {left}{f' and {right}' if right else ''}")
    return {"same": left, "left": left, "right": right or ""}.get(result, result)


def _among(name: str, names: str) -> bool:
    return names == "*" or name in names.split()
