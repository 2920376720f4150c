"""Commands from pydantic models: the fields become options, the docstring becomes the help."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from hfprune.experiment.plan import store_root
from hfprune.experiment.schema import parse
from hfprune.runtime.paths import expanded


@dataclass(frozen=True)
class Option:
    """Settings of an option that its field's type does not give.

    Attributes:
        is_positional: the value is written without the option's name.
        metavar: name of the value in the help.
        alone: the value if the option is written without one.
        is_repeated: the option is repeated for each value.
        takes_rest: the value is the rest of the command line.
    """

    is_positional: bool = False
    metavar: str | None = None
    alone: Any = None
    is_repeated: bool = False
    takes_rest: bool = False


POSITIONAL = Option(is_positional=True)
Count = Annotated[int, Field(ge=1)]


class Command(BaseModel):
    """A command of `hfprune`. Its docstring and the fields' descriptions are its help."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: ClassVar[tuple[str, ...]]
    examples: ClassVar[tuple[str, ...]]

    def run(self) -> None:
        """Run the command.

        Raises:
            UserError: a user's mistake.
        """
        raise NotImplementedError


class StoreCommand(Command):
    """A command that reads the store."""

    store: Path = Field(
        default_factory=lambda: store_root(Path("store")),
        description="folder of all artifacts (default: $HFPRUNE_STORE, or else store)",
    )


def add_command(
    parsers: Any, name: str, text: str, examples: tuple[str, ...], run: Callable
) -> argparse.ArgumentParser:
    """Add a command's parser to `parsers`. `run` is called with the parsed arguments."""
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
    """Add the parser of a declared command."""

    def run(args: argparse.Namespace) -> None:
        validated(args, command).run()

    text = (command.__doc__ or "").partition("\n\n")[0].replace("\n   ", "")
    add_options(add_command(parsers, command.words[-1], text, command.examples, run), command)


def validated(args: argparse.Namespace, section: type[BaseModel]) -> Any:
    """The parsed arguments as a validated `section`.

    Raises:
        UserError: a line for each mistake.
    """
    names = [field.alias or name for name, field in section.model_fields.items()]
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return parse(section, values)


def add_options(parser: argparse.ArgumentParser, section: type[BaseModel]) -> None:
    """Add an option for each field. An option that the user leaves out keeps the section's default."""
    for attribute, field in section.model_fields.items():
        name = field.alias or attribute
        option = next((item for item in field.metadata if isinstance(item, Option)), Option())
        settings: dict[str, Any] = {"help": _help(name, field), "default": argparse.SUPPRESS}
        if issubclass(section, Command) and _holds_paths(field.annotation):
            settings["type"] = path_option
        if option.is_positional:
            settings |= {"nargs": _positional(field, option), "metavar": option.metavar or name}
            parser.add_argument(name, **settings)
            continue
        settings["required"] = field.is_required()
        if field.annotation is bool and issubclass(section, Command):
            parser.add_argument(flag(name), action="store_true", **settings)
        elif option.is_repeated:
            parser.add_argument(flag(name), action="append", metavar=option.metavar, **settings)
        else:
            nargs = "?" if option.alone is not None else _count(field.annotation)
            settings |= {"nargs": nargs, "metavar": option.metavar or name.upper()}
            parser.add_argument(flag(name), **settings, **({"const": option.alone} if option.alone else {}))


def path_option(text: str) -> Path:
    """The path that an option's text means.

    Raises:
        ArgumentTypeError: `~user` of nobody; of other errors argparse does not print the message.
    """
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def flag(name: str) -> str:
    """The option of a name: `--` and hyphens."""
    return f"--{name.replace('_', '-')}"


def _help(name: str, field: FieldInfo) -> str:
    text = field.description or name
    if choices := _choices(field.annotation):
        text += f"; one of {', '.join(choices)}"
    if field.is_required() or field.default_factory is not None or field.default is None or field.default is False:
        return text.replace("%", "%%")
    default = " ".join(map(str, field.default)) if isinstance(field.default, list) else field.default
    return f"{text} (default: {default})".replace("%", "%%") if default != "" else text.replace("%", "%%")


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal, or of a Literal in a union with None."""
    literals = [kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) is Literal]
    return [str(value) for kind in literals for value in get_args(kind)]


def _positional(field: FieldInfo, option: Option) -> str | None:
    if option.takes_rest:
        return argparse.REMAINDER
    if _count(field.annotation) == "+":
        return "+" if field.is_required() else "*"
    return None if field.is_required() else "?"


def _count(annotation: Any) -> int | str | None:
    """The number of values of an option: the tuple's length, "+" for a list, or None for one value."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is tuple:
            return len(get_args(kind))
        if get_origin(kind) is list:
            return "+"
    return None


def _holds_paths(annotation: Any) -> bool:
    """Whether the type is a path or a list of paths; None may be allowed too."""
    return annotation is Path or any(
        kind is Path or (get_origin(kind) is list and Path in get_args(kind))
        for kind in (annotation, *get_args(annotation))
    )


def pair_of(value: Any) -> Any:
    """Split NAME=PATH.

    Raises:
        ValueError: the value does not have this form.
    """
    if not isinstance(value, str):
        return value
    name, _, path = value.partition("=")
    if not name or not path:
        raise ValueError("expected NAME=PATH")
    return name, expanded(path)


NamedPath = Annotated[tuple[str, Path], BeforeValidator(pair_of)]
