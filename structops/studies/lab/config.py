"""Settings of a study: one dataclass, which is also a YAML file and the options of a command.

A field is written once, with its option of the command line:

    @dataclass(frozen=True)
    class Settings:
        "What the command says of itself."
        structures: Annotated[tuple[str, ...], option("Specs.")] = ("dense", "btt")
        epochs: Annotated[int, option("Passes over the data.", min=1)] = 20

A YAML file gives defaults of the same options, so both are checked by the same rules and in the same words.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from structops._files import replacing
from structops.errors import StructureError

Config = TypeVar("Config")

option = typer.Option


def command(cls: type[Config], run: Callable[..., Any], extra: type[Any] | None = None) -> Callable[..., Any]:
    """A function for Typer whose options are the fields of a dataclass, and ``--config`` for a YAML file of them.

    Args:
        cls: A dataclass whose fields have defaults and are annotated with `option`.
        run: Called with the settings, and with an ``extra`` where there is one.
        extra: Another such dataclass, of options that are no settings of the study and not in the file.
    """
    parts = [part for part in (cls, extra) if part is not None]
    fields = {part: _parameters(part) for part in parts}

    def call(**values: Any) -> Any:
        values.pop("config")
        try:
            made = [part(**{name: values[name] for name in fields[part]}) for part in parts]
        except StructureError as error:
            raise typer.BadParameter(str(error)) from None
        return run(*made)

    def defaults(context: typer.Context, path: str | None) -> str | None:
        if path is not None:
            try:
                context.default_map = {**(context.default_map or {}), **_read(cls, Path(path))}
            except StructureError as error:
                raise typer.BadParameter(str(error)) from None
        return path

    file = Annotated[
        str | None, option(callback=defaults, is_eager=True, metavar="FILE", help="YAML file of these settings.")
    ]
    parameters = [parameter for part in parts for parameter in fields[part].values()]
    parameters.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = inspect.getdoc(cls).split("\nAttributes:")[0].strip()  # type: ignore[union-attr]
    return call


def read_config(cls: type[Config], path: str | Path) -> Config:
    """The settings in a YAML file, checked as the command line checks them.

    Raises:
        StructureError: The file is missing or no mapping, or a name or a value is wrong.
    """
    app = typer.Typer(add_completion=False)
    app.command()(command(cls, lambda config: config))
    main = typer.main.get_command(app)
    try:
        return main.main(["--config", str(path)], standalone_mode=False)  # type: ignore[no-any-return]
    except typer.BadParameter as error:
        raise StructureError(f"{path}: {error.format_message()}") from None


def write_config(config: Any, path: str | Path) -> None:
    """Write settings as YAML, whole or not at all."""
    import yaml

    values = {field.name: getattr(config, field.name) for field in settings_of(type(config))}
    data = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    title = f"# structops study {config.name} --config ...\n" if hasattr(config, "name") else ""
    with replacing(path) as file:
        file.write(title.encode())
        file.write(yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode())


def settings_of(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    """The fields that can be set: a study that fixes fields of a class above it names them in ``FIXED``."""
    return [field for field in dataclasses.fields(cls) if field.name not in getattr(cls, "FIXED", ())]


def _parameters(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """The fields as parameters for Typer, which has no options of several values in one text."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in settings_of(cls):
        kind, said = get_args(hints[field.name])[:2]
        if get_origin(kind) is tuple:
            # Within Annotated, Typer keeps the first name in the place of the default.
            names = [name for name in (said.default, *(said.param_decls or ())) if isinstance(name, str)]
            said = option(
                *names,
                parser=_sequence(get_args(kind)[0]),
                metavar="A;B;...",
                help=said.help,
                show_default="; ".join(map(str, field.default)),  # type: ignore[arg-type]
            )
            kind = Any
        annotation = Annotated[kind, said]  # type: ignore[valid-type]
        found[field.name] = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
        )
    return found


def _sequence(kind: type[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """A parser of texts with semicolons; what is a sequence already is checked, too."""

    def parse(value: Any) -> tuple[Any, ...]:
        # Specs have commas in them, numbers have not.
        text = value.replace(",", ";") if isinstance(value, str) and kind is not str else value
        parts = text.split(";") if isinstance(text, str) else list(text)
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        parts = [part for part in parts if part != ""]
        try:
            if not parts or any(isinstance(part, float) and kind is int for part in parts):
                raise ValueError
            return tuple(kind(part) for part in parts)
        except (TypeError, ValueError):
            message = f"expected one or more of type {kind.__name__} with semicolons between them, got {value!r}"
            raise typer.BadParameter(message) from None

    return parse


def _read(cls: type[Any], path: Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise StructureError("a file of settings needs PyYAML: pip install 'structops[studies]'") from error
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StructureError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise StructureError(f"{path}: expected `name: value` lines, got {type(data).__name__}")
    known = [field.name for field in settings_of(cls)]
    if unknown := [str(name) for name in data if name not in known]:
        raise StructureError(f"{path}: {', '.join(unknown)} not among {', '.join(known)}")
    return data
