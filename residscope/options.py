"""Builds a command line from a configuration dataclass.

A configuration is a frozen, keyword-only dataclass; the docstring under a field is the help of its flag, the field's
default is the flag's default, and its annotation determines how a word on the command line is parsed:

    str, int, float, Path      one word
    bool                       --flag / --no-flag
    Literal["a", "b"]          one of the words
    X | None                   as X; the default may be None
    tuple[X, ...]              one or more words; giving the flag again adds more

A field without a default is a required flag. A field that is itself such a dataclass is a group: its fields are flags
under their own names, and `--help` shows them together under the first sentence of its docstring. The names in a
configuration's `FIRST_FLAGS` are shown before all groups. `--config FILE.toml` gives values under the same names, or in
a table of the group's name; flags win over it. Only the standard library is imported, so that `--help` answers at once.
"""

import argparse
import ast
import dataclasses
import difflib
import itertools
import json
import os
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from residscope.errors import UsageError
from residscope.memory import require_address_space
from residscope.reading import CONFIG_BYTES, reading
from residscope.urls import as_path

T = TypeVar("T")


class _Version(argparse.Action):
    """--version: looks the version up only when needed, because that takes as long as all of --help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, help="show the version and exit", **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} (residscope {version('residscope')})")
        parser.exit()


class CommandParser(argparse.ArgumentParser):
    """argparse's parser with --version, and with one-line errors that do not list all flags."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.add_argument("--version", action=_Version)

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """After parsing, also raises `ResidscopeError` if the command cannot run in this address space."""
        found = super().parse_known_args(*arguments, **options)
        require_address_space(self.prog)
        return found

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2; for an unknown flag, suggest the nearest known one."""
        if message.startswith("unrecognized arguments"):
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            wrong = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            near = [flag for word in wrong for flag in difflib.get_close_matches(word, flags, n=1, cutoff=0.7)]
            message += f" (did you mean {' '.join(near)}?)" if near else ""
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def field_docstrings(config_class: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from the source of its module; bases included."""
    found: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        source_file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if cls is object or source_file is None:
            continue
        tree = ast.parse(Path(source_file).read_text(encoding="utf-8"))
        body = next((n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__), [])
        for pair in itertools.pairwise(body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def parse_options(
    config_class: type[T], argv: Sequence[str] | None, *, prog: str, description: str, epilog: str | None = None
) -> T:
    """Read `argv` (default `sys.argv[1:]`) into a `config_class`.

    Bad words end the process with exit code 2, as in argparse; values that the configuration refuses: `UsageError`.
    """
    words: Any = {"prog": prog, "description": description, "epilog": epilog}
    parser = CommandParser(**words, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.toml", help="values for any of these flags, by name; flags win")
    fields = _fields(config_class)
    _add_flags(parser, config_class, fields)
    parser.usage = " ".join([prog, *(f"{field.flag} ..." for field in fields.values() if field.required), "[flags]"])
    for word in sys.argv[1:] if argv is None else argv:
        try:
            word.encode()
        except UnicodeEncodeError:  # The terminal's or a file name's encoding is not UTF-8.
            raise UsageError(f"{word!a}: should be UTF-8; rename the file, or set the terminal to UTF-8") from None
    given = vars(parser.parse_args(argv))
    config_file = given.pop("config")
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    if config_file is not None:
        values = {**_read_toml(as_path(config_file), fields), **values}
    if missing := [f for f in fields.values() if f.required and f.name not in values]:
        parser.error("missing " + ", ".join(f.flag for f in missing))
    return from_flat(config_class, values)


def from_flat(config_class: type[T], values: Mapping[str, Any]) -> T:
    """A configuration from values by flag name, whatever their group; TypeError for unknown names."""
    rest = dict(values)
    for name, group in _groups(config_class).items():
        own = {field.name: rest.pop(field.name) for field in dataclasses.fields(group) if field.name in rest}
        if name not in rest or own:
            rest[name] = group(**own)
    return config_class(**rest)


def to_flat(config: Any) -> dict[str, Any]:
    """All values of a configuration by flag name; the inverse of `from_flat`."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= to_flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def with_values(config: T, **values: Any) -> T:
    """The configuration with some flags' values changed; it is checked again."""
    return from_flat(type(config), {**to_flat(config), **values})


def _groups(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    names = (field.name for field in dataclasses.fields(config_class))  # type: ignore[arg-type]
    return {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}


def to_toml(values: Mapping[str, Any]) -> str:
    """`values` as flat TOML: strings, numbers, booleans and lists of them; None is left out (TOML has no null)."""
    lines = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, Path):
            value = str(value)
        # JSON scalars and lists of scalars are valid TOML if non-ASCII text is not escaped, but DEL is.
        text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
        lines.append(f"{name} = {text.replace(chr(127), chr(92) + 'u007f')}")
    return "\n".join(lines) + "\n"


def require_at_least(least: int, **values: int | None) -> None:
    """`UsageError` for an option with a value below `least`; None is allowed."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} should be at least {least}, found {value}")


def require_workers(**values: int | None) -> None:
    """`UsageError` for a number of processes or threads below 1, or more than this machine can bear (all are started at
    once); None is allowed."""
    require_at_least(1, **values)
    most = max(32, 4 * (os.cpu_count() or 1))
    for name, value in values.items():
        if value is not None and value > most:
            raise UsageError(f"--{name.replace('_', '-')} should be at most {most} on this machine, found {value}")


def require_seed(seed: int) -> None:
    """`UsageError` for a seed that torch does not accept."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed should be at least 0 and below 2^63, found {seed}")


@dataclasses.dataclass(frozen=True)
class _Field:
    """What the command line needs to know about one field."""

    name: str
    annotation: Any
    required: bool
    help: str
    group: str
    """The configuration's field with its group; "" if it is not in a group."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _fields(config_class: type, group: str = "") -> dict[str, _Field]:
    """All flags by name, including those of groups, in the order of the source."""
    hints = typing.get_type_hints(config_class)
    texts = field_docstrings(config_class)
    groups = _groups(config_class)
    found: dict[str, _Field] = {}
    for spec in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if spec.name in groups:
            inner = _fields(groups[spec.name], spec.name)
            assert not inner.keys() & found.keys(), f"two flags of one name: {inner.keys() & found.keys()}"
            found |= inner
            continue
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        text = texts.get(spec.name, "").replace("%", "%%")
        if required:
            text += " (required)"
        elif spec.default not in (None, (), dataclasses.MISSING):
            text += f" (default: {_shown(spec.default)})"
        found[spec.name] = _Field(spec.name, _without_none(hints[spec.name]), required, text, group)
    return found


def _add_flags(parser: argparse.ArgumentParser, config_class: type, fields: Mapping[str, _Field]) -> None:
    """Add the flags to the parser: first `FIRST_FLAGS`, then group by group."""
    first = getattr(config_class, "FIRST_FLAGS", ())
    titles = {name: (group.__doc__ or name).partition(".")[0] for name, group in _groups(config_class).items()}
    sections: dict[str, Any] = {}
    rest = sorted((field for name, field in fields.items() if name not in first), key=lambda field: not field.group)
    for field in [*(fields[name] for name in first), *rest]:
        title = "most used" if field.name in first else titles.get(field.group, "other" if first else "")
        if title and title not in sections:
            sections[title] = parser.add_argument_group(title)
        section = sections[title] if title else parser
        how = {"default": argparse.SUPPRESS, **_reader(field.annotation)}  # a flag that is not given has no value
        section.add_argument(field.flag, help=field.help, dest=field.name, **how)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation
    kept = [a for a in typing.get_args(annotation) if a is not type(None)]
    return kept[0] if len(kept) == 1 else annotation


def _reader(annotation: Any) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for a flag of this type."""
    origin = typing.get_origin(annotation)
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is typing.Literal:
        return {"choices": typing.get_args(annotation)}
    if origin is tuple:
        (item, *_) = typing.get_args(annotation)
        kind = home_path if item is Path else item
        return {"nargs": "+", "type": kind, "metavar": item.__name__.upper(), "action": "extend"}
    return {
        "type": home_path if annotation is Path else annotation,
        "metavar": {"str": "TEXT", "Path": "PATH"}.get(annotation.__name__, annotation.__name__.upper()),
    }


def home_path(word: str) -> Path:
    """A path or URL; expands a leading `~/`, which a shell does not expand after `--out=` or in a TOML file."""
    return Path(word).expanduser() if word.startswith("~/") else as_path(word)


def read_word(word: str, annotation: Any, what: str) -> Any:
    """A word parsed as `annotation` ("none" if that allows None); else `UsageError`, which begins with `what`."""
    kind = _without_none(annotation)
    if kind is not annotation and word.lower() == "none":
        return None
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
    if kind is bool:
        choices = (True, False)
        word = {"yes": "True", "true": "True", "no": "False", "false": "False"}.get(word.lower(), word)
    try:
        value = next(c for c in choices if str(c) == word) if choices else kind(word)
    except (StopIteration, ValueError, TypeError):
        shown = " or ".join(map(str, choices)) if choices else getattr(kind, "__name__", str(kind))
        raise UsageError(f"{what} should be {shown}, found {word!r}") from None
    return value


def _read_toml(path: Path, fields: Mapping[str, _Field]) -> dict[str, Any]:
    try:
        with reading(f"--config {path}: not valid TOML", kind=UsageError), path.open("rb") as file:
            found = tomllib.loads(file.read(CONFIG_BYTES).decode())  # limited, since a device has no end
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    tables = {field.group for field in fields.values()} - fields.keys()
    given: list[tuple[str, str, Any]] = []
    for key, value in found.items():
        in_table = key in tables and isinstance(value, dict)
        given += [(key, *pair) for pair in value.items()] if in_table else [("", key, value)]
    values: dict[str, Any] = {}
    for table, key, value in given:
        name = key.replace("-", "_")
        if name not in fields:
            raise UsageError(f"--config {path}: unknown option {key!r}; the options are {', '.join(sorted(fields))}")
        if table not in ("", group := fields[name].group):
            where = f"in [{group}] or above all tables" if group else "above all tables"
            raise UsageError(f"--config {path}: {key} is not an option of [{table}]: it belongs {where}")
        if name in values:
            raise UsageError(f"--config {path}: {name} is given twice; keep one")
        values[name] = _from_toml(value, fields[name].annotation, f"--config {path}: {name}")
    return values


def _from_toml(value: Any, annotation: Any, what: str) -> Any:
    """A TOML value converted to `annotation`; else `UsageError`, which begins with `what`."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return tuple(_from_toml(each, arguments[0], what) for each in (value if isinstance(value, list) else [value]))
    if annotation is Path and isinstance(value, str):
        return home_path(value)
    if annotation is float and type(value) is int:
        return float(value)
    if not (value in arguments if arguments else type(value) is annotation):
        shown = " | ".join(map(repr, arguments)) or annotation.__name__
        raise UsageError(f"{what} should be {shown}, found {value!r}")
    return value
