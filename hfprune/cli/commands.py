"""Commands from typed declarations: a pydantic model's fields are the options, its docstring the help."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from hfprune.experiment.plan import store_root
from hfprune.experiment.schema import parse
from hfprune.runtime.paths import expanded


@dataclass(frozen=True)
class Option:
    """What a field's type does not say about its option.

    Attributes:
        is_positional: the value stands without the option's name.
        metavar: what the help calls the value.
        alone: what the option means without a value.
        is_repeated: the option is given once for each value.
        takes_rest: all that follows is its value.
    """

    is_positional: bool = False
    metavar: str | None = None
    alone: Any = None
    is_repeated: bool = False
    takes_rest: bool = False


POSITIONAL = Option(is_positional=True)
Count = Annotated[int, Field(ge=1)]


class Command(BaseModel):
    """A command of `hfprune`: its docstring and the fields' descriptions are its help."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: ClassVar[tuple[str, ...]]
    examples: ClassVar[tuple[str, ...]]

    def run(self) -> None:
        """Do it.

        Raises:
            UserError: a user's mistake.
        """
        raise NotImplementedError


class StoreCommand(Command):
    """A command that reads the store."""

    store: Path = Field(
        default_factory=lambda: store_root(Path("store")), description="default: HFPRUNE_STORE, or else store"
    )


def add_command(
    parsers: Any, name: str, text: str, examples: tuple[str, ...], run: Callable
) -> argparse.ArgumentParser:
    """The parser of a command, below `parsers`; `run` is called with the parsed words."""
    parser = parsers.add_parser(
        name,
        help=text,
        description=text,
        epilog="example:\n  " + "\n  ".join(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_typed(parsers: Any, command: type[Command]) -> None:
    """The parser of a declared command."""

    def run(args: argparse.Namespace) -> None:
        given(args, command).run()

    text = (command.__doc__ or "").partition("\n\n")[0].replace("\n   ", "")
    add_options(add_command(parsers, command.words[-1], text, command.examples, run), command)


def given(args: argparse.Namespace, section: type[BaseModel]) -> Any:
    """The parsed words as a validated `section`.

    Raises:
        UserError: one line per fault.
    """
    names = [field.alias or name for name, field in section.model_fields.items()]
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return parse(section, values, f"hfprune {args.command}")


def add_options(parser: argparse.ArgumentParser, section: type[BaseModel]) -> None:
    """An option for each field; those that are not given are left to the section's defaults."""
    for attribute, field in section.model_fields.items():
        name = field.alias or attribute
        option = next((each for each in field.metadata if isinstance(each, Option)), Option())
        settings: dict[str, Any] = {"help": _help(name, field), "default": argparse.SUPPRESS}
        if issubclass(section, Command) and _holds_paths(field.annotation):
            settings["type"] = expanded
        if option.is_positional:
            settings |= {"nargs": _positional(field, option), "metavar": option.metavar or name}
            parser.add_argument(name, **settings)
            continue
        settings["required"] = field.is_required()
        if field.annotation is bool and issubclass(section, Command):
            parser.add_argument(spelled(name), action="store_true", **settings)
        elif option.is_repeated:
            parser.add_argument(spelled(name), action="append", metavar=option.metavar, **settings)
        else:
            nargs = "?" if option.alone is not None else _count(field.annotation)
            settings |= {"nargs": nargs, "metavar": option.metavar or name.upper()}
            parser.add_argument(spelled(name), **settings, **({"const": option.alone} if option.alone else {}))


def spelled(name: str) -> str:
    """A name as an option."""
    return f"--{name.replace('_', '-')}"


def _help(name: str, field: FieldInfo) -> str:
    text = field.description or name
    if field.is_required() or field.default_factory is not None or field.default in (None, False, []):
        return text.replace("%", "%%")
    return f"{text} (default: {field.default})".replace("%", "%%")


def _positional(field: FieldInfo, option: Option) -> str | None:
    if option.takes_rest:
        return argparse.REMAINDER
    if _count(field.annotation) == "+":
        return "+" if field.is_required() else "*"
    return None if field.is_required() else "?"


def _count(annotation: Any) -> int | str | None:
    """How many words an option takes: those of a tuple, one or more for a list, or one (None)."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is tuple:
            return len(get_args(kind))
        if get_origin(kind) is list:
            return "+"
    return None


def _holds_paths(annotation: Any) -> bool:
    """Whether it is a path, a list of them, or either or None."""
    return annotation is Path or any(
        kind is Path or (get_origin(kind) is list and Path in get_args(kind))
        for kind in (annotation, *get_args(annotation))
    )


def pair_of(value: Any) -> Any:
    """NAME=PATH as its two parts.

    Raises:
        ValueError: it is not of this form.
    """
    if not isinstance(value, str):
        return value
    name, _, path = value.partition("=")
    if not name or not path:
        raise ValueError("expected NAME=PATH")
    return name, expanded(path)


NamedPath = Annotated[tuple[str, Path], BeforeValidator(pair_of)]
