"""Tasks by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from structops.errors import DataError, StructureError
from structops.spec import parse
from structops.studies.data.augment import Augment
from structops.studies.data.built_in import digits_task, mnist5k, tabular
from structops.studies.data.cifar import cifar10, cifar100
from structops.studies.data.hub import hub
from structops.studies.data.pictures import images
from structops.studies.data.task import Task, permuted
from structops.studies.data.text import language, pydoc_text, read_text, token_files


def _pydoc(**options: Any) -> Task:
    return language("pydoc", pydoc_text(), **options)


def _text(path: Path, **options: Any) -> Task:
    return language(f"text:{path}", read_text(path), **options)


# What takes the options of a name, and whether a path follows it.
NAMED: dict[str, Callable[..., Task]] = {
    "digits": digits_task,
    "mnist5k": mnist5k,
    "breast_cancer": tabular("breast_cancer"),
    "wine": tabular("wine"),
    "diabetes": tabular("diabetes"),
    "pydoc": _pydoc,
}
AT_PATH: dict[str, Callable[..., Task]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "images": images,
    "hub": hub,
    "text": _text,
    "tokens": token_files,
}
OPTIONS_OF: dict[str, Callable[..., Task]] = {"pydoc": language, "text": language, "hub": hub}


def names() -> list[str]:
    """What :func:`load` takes."""
    return [*NAMED, *(f"{name}:PATH" for name in AT_PATH)]


def load(text: str, *, augment: Augment | None = None, permute_pixels: bool = False, **options: Any) -> Task:
    """A task by its name, or by its kind and the path of its files.

    ============================  =====================================================================
    ``digits``, ``mnist5k``       handwritten digits, 8 x 8 and 28 x 28
    ``breast_cancer``, ``wine``   tables, classification
    ``diabetes``                  table, regression
    ``pydoc``                     the help texts of Python, English
    ``cifar10:PATH``              the binary version, a folder or a tar.gz; also ``cifar100:PATH``
    ``images:PATH``               folders train/CLASS and val/CLASS of images
    ``hub:NAME`` or ``hub:PATH``  a data set of the library datasets
    ``text:PATH``                 a file of text or a folder of .txt files
    ``tokens:PATH``               a folder with train.bin and val.bin of nanoGPT
    ============================  =====================================================================

    Options can also be part of the text, behind the name, as literals of Python: ``pydoc(tokens='bpe', context=64)``
    or ``images(size=64):PATH``.

    Args:
        text: As above.
        augment: Of the training batches.
        permute_pixels: Whether images become vectors with pixels in one fixed random order (paper, Section 4.1).
        options: Of this kind of data; an unknown one is answered with those that exist.

    Raises:
        DataError: If the name or an option is unknown, or files are missing or broken.
        ImportError: If a library is missing; the message names the extra that installs it.
        StructureError: If the task cannot be augmented like that.
    """
    match = re.fullmatch(r"\s*(\w+(?:\(.*?\))?)(?::(.*))?", text)
    try:
        name, written = parse(match[1] if match else text)
    except StructureError as error:
        raise DataError(f'expected one of {", ".join(names())}, as in "pydoc(context=64)"; got {text!r}') from error
    path = match[2] if match else None
    if name in NAMED and path is None:
        make = NAMED[name]
    elif name in AT_PATH and path:
        make = partial(AT_PATH[name], Path(path).expanduser())
    else:
        raise DataError(f"expected one of {', '.join(names())}; got {text!r}")
    if twice := sorted(set(written) & set(options)):
        raise DataError(f"{text}: {', '.join(twice)} is given twice")
    options |= written
    permute_pixels = options.pop("permute_pixels", permute_pixels)
    known = [
        parameter.name
        for parameter in inspect.signature(OPTIONS_OF.get(name, make)).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    if unknown := [option for option in options if option not in known]:
        raise DataError(f"{name} has no option {', '.join(unknown)}; it has {', '.join([*known, 'permute_pixels'])}")
    task = make(**options)
    if permute_pixels:
        if len(task.input_shape) != 3:
            raise DataError(f"permute_pixels is for images, but inputs of {name} have shape {task.input_shape}")
        task = permuted(task)
    return replace(task, name=text, augment=augment or task.augment)
