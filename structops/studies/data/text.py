"""Text as a task: windows of tokens, each with the token that follows at every place as the target."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from structops._files import replacing
from structops.errors import DataError
from structops.studies.data.augment import Boxes
from structops.studies.data.built_in import EXTRA
from structops.studies.data.task import Task

Numbers = np.ndarray[Any, Any]
UNKNOWN = 0  # the token of characters that the training text lacks
GPT2_VOCABULARY = 50304  # 50,257 tokens, padded to a multiple of 64 as nanoGPT does


class Tokens(Protocol):
    """What turns text into numbers and back."""

    @property
    def vocab_size(self) -> int:
        """Numbers of tokens are below this."""

    def encode(self, text: str) -> Numbers:
        """Tokens of a text, a vector of whole numbers."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of ``context`` tokens; the targets are one token further on.

    Attributes:
        tokens: The text, a vector of whole numbers, which may lie in a file.
        context: Tokens of a window.
        vocab_size: Every token must be below this.
        source: Named in errors.

    Raises:
        DataError: If there is not a single window; when read, if a token is beyond the vocabulary.
    """

    tokens: Numbers
    context: int
    vocab_size: int
    source: str

    def __post_init__(self) -> None:
        if self.context < 1:
            raise DataError(f"a window has at least one token, got context={self.context}")
        if len(self.tokens) <= self.context:
            raise DataError(
                f"{self.source}: {len(self.tokens)} tokens are too few for windows of {self.context} and the next "
                "token; take more text or a smaller context"
            )

    def __len__(self) -> int:
        """Windows that do not overlap."""
        return (len(self.tokens) - 1) // self.context

    def choose(self, step: int, batch_size: int, seed: int) -> Numbers:
        """First tokens of windows at random places, which may overlap."""
        return np.random.default_rng([seed, step]).integers(0, len(self.tokens) - self.context, batch_size)

    def in_order(self) -> Numbers:
        """First tokens of consecutive windows; the tokens at the end that fill none are left out."""
        return np.arange(len(self)) * self.context

    def read(self, index: Numbers, boxes: Boxes | None = None) -> tuple[Numbers, Numbers]:
        """Inputs and targets (b, context), int64, of windows that begin at ``index``."""
        window = self.tokens[index[:, None] + np.arange(self.context + 1)].astype(np.int64)
        if window.max() >= self.vocab_size:
            raise DataError(f"{self.source}: token {window.max()} is outside the vocabulary of {self.vocab_size}")
        return window[:, :-1], window[:, 1:]


@dataclass(frozen=True, eq=False)
class Characters:
    """Every character of the training text is a token; token 0 is ``<unk>``, for all others.

    Attributes:
        codes: Code points in increasing order; that of token ``i`` is ``codes[i-1]``.
    """

    codes: Numbers

    @classmethod
    def of(cls, text: str) -> Characters:
        """The characters of a text."""
        return cls(np.unique(_code_points(text)))

    @property
    def vocab_size(self) -> int:
        """Characters, and one for those that are unknown."""
        return len(self.codes) + 1

    def encode(self, text: str) -> Numbers:
        """A token a character."""
        points = _code_points(text)
        place = np.minimum(np.searchsorted(self.codes, points), len(self.codes) - 1)
        return np.where(self.codes[place] == points, place + 1, UNKNOWN).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters; the unknown one is U+FFFD."""
        letters = ["\ufffd", *map(chr, self.codes)]
        return "".join(letters[token] for token in tokens)


@dataclass(frozen=True)
class Pieces:
    """Tokens of the library ``tokenizers``.

    Attributes:
        definition: What a ``tokenizer.json`` holds.
    """

    definition: str

    @classmethod
    def trained(cls, text: str, vocab_size: int) -> Pieces:
        """Byte-level BPE of a text: 256 bytes, and the most frequent pairs until there are ``vocab_size`` tokens.

        Raises:
            DataError: If ``vocab_size`` is below 256.
            ImportError: If ``tokenizers`` is not installed.
        """
        if vocab_size < 256:
            raise DataError(f"byte-level BPE has at least the 256 bytes as tokens, got vocab_size={vocab_size}")
        library = _tokenizers()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            text.splitlines(keepends=True),
            library.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(alphabet), show_progress=False),
        )
        return cls(tokenizer.to_str())

    @classmethod
    def read(cls, path: Path) -> Pieces:
        """The tokens of a ``tokenizer.json``, GPT-2's for example.

        Raises:
            DataError: If the file is missing or does not define tokens.
        """
        try:
            pieces = cls(path.read_bytes().decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: expected a tokenizer.json ({error})") from error
        library = _tokenizers()
        try:
            library.Tokenizer.from_str(pieces.definition)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path}: expected a tokenizer.json of the library tokenizers ({error})") from error
        return pieces

    @cached_property
    def tokenizer(self) -> Any:
        """The object of the library."""
        return _tokenizers().Tokenizer.from_str(self.definition)

    @property
    def vocab_size(self) -> int:
        """Tokens, the added ones included; may be fewer than asked for, if the text has no more pairs to merge."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> Numbers:
        """Tokens without any that mark the beginning or the end."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))


def language(
    name: str,
    text: str,
    test_text: str = "",
    *,
    tokens: str = "char",
    context: int = 128,
    vocab_size: int = 512,
    test_fraction: float = 0.1,
    save_tokenizer: str = "",
) -> Task:
    """A task of a text, whose end is the test.

    Args:
        name: Of the task.
        text: All of it.
        test_text: A test of its own; then ``text`` is all for training.
        tokens: ``char``, ``bpe``, both made from the training part, or the path of a ``tokenizer.json``.
        context: Tokens of a window.
        vocab_size: Of ``bpe``.
        test_fraction: Share of the characters, at the end, that are the test.
        save_tokenizer: Where the tokens of ``bpe`` are written as JSON, for ``tokens=`` of another time.

    Raises:
        DataError: If the text is too short, or an option is out of range.
        ImportError: If ``tokenizers`` is needed and not installed.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"expected 0 < test_fraction < 1, got {test_fraction}")
    if save_tokenizer and tokens != "bpe":
        raise DataError(f"save_tokenizer is for tokens='bpe', got tokens={tokens!r}")
    if not test_text:
        border = len(text) - round(len(text) * test_fraction)
        text, test_text = text[:border], text[border:]
    if not text or not test_text:
        raise DataError(f"{name}: {len(text) + len(test_text)} characters are too few for a training and a test text")
    tokenizer: Tokens
    if tokens == "char":
        tokenizer = Characters.of(text)
    elif tokens == "bpe":
        tokenizer = Pieces.trained(text, vocab_size)
        if save_tokenizer:
            with replacing(save_tokenizer) as file:
                file.write(tokenizer.definition.encode())
    elif tokens.endswith(".json"):
        tokenizer = Pieces.read(Path(tokens).expanduser())
    else:
        raise DataError(f"expected tokens='char', 'bpe' or the path of a tokenizer.json, got {tokens!r}")
    size = tokenizer.vocab_size
    train = Windows(tokenizer.encode(text), context, size, f"{name}, training text")
    test = Windows(tokenizer.encode(test_text), context, size, f"{name}, test text")
    facts: dict[str, Any] = {
        "characters": len(text) + len(test_text),
        "sha256": hashlib.sha256((text + test_text).encode()).hexdigest(),
        "tokens": tokens,
        "train_tokens": len(train.tokens),
        "test_tokens": len(test.tokens),
    }
    if tokens == "char":
        facts["unknown_test_tokens"] = int((test.tokens == UNKNOWN).sum())
    return Task(name, "language", train, test, (context,), vocab_size=size, tokenizer=tokenizer, facts=facts)


def read_text(path: Path) -> str:
    """A file of text, or all ``.txt`` files of a folder and its folders, in the order of their paths.

    Raises:
        DataError: If there is none, or one is not UTF-8.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise DataError(f"{path}: expected .txt files in the folder, found none")
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"{path}: expected a file of text or a folder of .txt files, found nothing there")
    texts = []
    for file in files:
        try:
            texts.append(file.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}: expected UTF-8, but byte {error.object[error.start]:#04x} at offset {error.start} is not "
                f"({error.reason}); convert the file, for example with iconv -f latin1 -t utf-8"
            ) from error
    return "\n".join(texts)


def pydoc_text() -> str:
    """The topics of Python's ``help()``, in alphabetical order: about half a megabyte of English with code.

    The text depends on the version of Python, so that losses compare only within one version; ``facts["sha256"]`` of
    the task tells texts apart.  Licence: PSF 2.0.

    Raises:
        DataError: If this Python comes without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python comes without pydoc_data, the topics of help(); take text:PATH instead") from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def token_files(path: Path, *, context: int = 1024, vocab_size: int = GPT2_VOCABULARY) -> Task:
    """A task of ``train.bin`` and ``val.bin`` of nanoGPT: tokens as unsigned 16-bit numbers, read from disk by windows.

    Args:
        path: Folder of the two files.
        context: Tokens of a window.
        vocab_size: Of the tokens; the default is that of GPT-2.  Every batch is checked.

    Raises:
        DataError: If a file is missing, empty or not of whole numbers of 16 bits.
    """
    parts = []
    for name in ("train.bin", "val.bin"):
        file = path / name
        if not file.is_file():
            raise DataError(f"{file}: not found; expected train.bin and val.bin as nanoGPT's prepare.py writes them")
        size = file.stat().st_size
        if size == 0 or size % 2:
            raise DataError(f"{file}: expected 16-bit numbers, got {size} bytes; the file seems to be cut off")
        parts.append(Windows(np.memmap(file, "<u2", mode="r"), context, vocab_size, str(file)))
    train, test = parts
    facts = {"train_tokens": len(train.tokens), "test_tokens": len(test.tokens)}
    return Task(f"tokens:{path}", "language", train, test, (context,), vocab_size=vocab_size, facts=facts)


def _code_points(text: str) -> Numbers:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _tokenizers() -> Any:
    """The library, with the modules that it does not load by itself."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"these tokens need the library tokenizers: {EXTRA}") from error
    return tokenizers
