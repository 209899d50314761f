"""Flags made from dataclass fields: an option is defined where it is used, as a field with its help text.

A command takes whole objects (`options: ExecutionOptions, request: Request`); `with_options` gives it one flag for each
of their fields, and calls it with the objects. It imports neither pydantic nor torch: `--help` and shell completion
read it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from harness.cells.request import Request
from harness.engine.options import ExecutionOptions, check_device_name, check_tracking
from harness.errors import UserError, did_you_mean, shown
from harness.launch.choice import LauncherChoice
from harness.util.option import environment_number

_PANELS: dict[type, str] = {Request: "Cell", LauncherChoice: "Launcher", ExecutionOptions: "Execution"}
"""The dataclasses whose fields become flags, each with its section of `--help`."""


@dataclasses.dataclass(frozen=True)
class Only:
    """`Annotated[ExecutionOptions, Only("runs")]`: flags for these fields alone; the others keep their defaults."""

    names: frozenset[str]

    def __init__(self, *names: str):
        object.__setattr__(self, "names", frozenset(names))

    def __contains__(self, name: str) -> bool:
        return name in self.names


class Without(Only):
    """Flags for every field but these."""

    def __contains__(self, name: str) -> bool:
        return name not in self.names


def read_path(text: str) -> Path:
    """A path from the command line. Rejects an empty one, which would mean the current folder."""
    if not str(text).strip():
        raise typer.BadParameter("it is empty; name a file or folder")
    return Path(text)


Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="plain lines instead of a progress bar or live table")]


Decorated = Callable[..., None]
_UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""The base of all errors in a command line; typer does not export it."""


def with_options(*, example: str = "") -> Callable[[Decorated], Decorated]:
    """Decorator for commands: replaces a parameter that is annotated with one of `_PANELS` by a flag for each field.

    `example` is a command line for `--help`. Plugins are loaded and the run folder is checked before the command is
    called. The command raises `UserError` for a value that cannot be read.
    """

    def decorate(command: Decorated) -> Decorated:
        parameters: list[inspect.Parameter] = []
        groups: dict[str, tuple[type, list[dataclasses.Field[Any]]]] = {}
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            cls, selected = _options_class(parameter.annotation)
            if cls is None:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            fields = [field for field in dataclasses.fields(cls) if _on_command_line(field) and field.name in selected]
            groups[parameter.name] = (cls, fields)
            parameters += [_parameter(parameter.name, cls, field) for field in fields]

        @functools.wraps(command)
        def call(**values: Any) -> None:
            for name, (cls, fields) in groups.items():
                read = {field.name: _read(field, values.pop(f"{name}_{field.name}")) for field in fields}
                values[name] = cls(**{key: value for key, value in read.items() if value is not None})
                if isinstance(values[name], ExecutionOptions):
                    values[name] = _prepared(values[name], read)
            command(**values)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        call.example = example  # type: ignore[attr-defined]  # and typer copies a command's attributes
        return call

    return decorate


def given_fields(context: typer.Context, group: str, options: Any) -> dict[str, Any]:
    """The fields of a command's parameter `group` that the user set, by a flag or an environment variable."""
    sources = {name: context.get_parameter_source(f"{group}_{name}") for name in vars(options)}
    return {name: getattr(options, name) for name, source in sources.items() if source and source.name != "DEFAULT"}


def read_pairs(pairs: Iterable[str], flag: str) -> dict[str, str]:
    """KEY=VALUE pairs of a repeatable flag. Raises `UserError`."""
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"{flag} {shown(pair)}: expected KEY=VALUE")
        if key in settings:
            raise UserError(f"{flag} {shown(pair)}: {key} is set twice")
        settings[key] = value
    return settings


class Command(TyperCommand):
    """A command whose `--help` shows the options in sections, as plain text, and its example verbatim."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                title = getattr(parameter, "rich_help_panel", None) or default
                sections.setdefault(title, []).append(record)
        for title in ("Arguments", *_PANELS.values(), "Options"):
            if records := sections.get(title):
                with formatter.section(title):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            raise UserError(_usage_problem(error, ctx, given)) from error

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if example := getattr(self.callback, "example", ""):
            formatter.write(f"\nExample:\n  {example}\n")


class Group(TyperGroup):
    """`harness` itself: an unknown command is a one-line error."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None:
            raise UserError(f"{args[0]}: no such command; {did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


def _usage_problem(error: Any, ctx: Any, given: list[str]) -> str:
    """One line, as for every other error: the flag, the value, the problem."""
    message = str(getattr(error, "message", "") or "").removeprefix("Value error, ")  # pydantic's words, not the user's
    if not isinstance(error, typer.BadParameter) or error.param is None or not message:
        return " ".join(error.format_message().split())
    names = error.param.opts if error.param.param_type_name == "option" else [str(error.param.name)]
    flag = next((name for name in names if name in given), names[0])
    value = given[given.index(flag) + 1] if flag in given[:-1] else ""
    return f"{f'{flag} {shown(value) if value else value}'.rstrip()}: {message[0].lower()}{message[1:].rstrip('.')}"


# ---- one field -------------------------------------------------------------------------------------------------------


def _options_class(annotation: Any) -> tuple[type | None, Only]:
    selected: Only = Without()
    if get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        selected = next((extra for extra in extras if isinstance(extra, Only)), selected)
    return (annotation if annotation in _PANELS else None), selected


def _on_command_line(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata) and field.metadata["on_command_line"]


def _flags(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    return field.metadata["flags"] or (f"--{field.name.replace('_', '-')}",)


def _type(cls: type, field: dataclasses.Field[Any]) -> Any:
    """The annotation for typer: the field's own type, or `str` where this module parses the text."""
    metadata = field.metadata
    kind = metadata["type"] or eval(str(field.type), vars(sys.modules[cls.__module__]))
    origin = get_origin(kind)
    if kind is dict or origin in (dict, Mapping):
        return list[str] | None
    if origin is tuple:
        return list[get_args(kind)[0]] | None  # type: ignore[misc]  # a type computed at run time
    return str | None if metadata["read"] else kind


def _parameter(group: str, cls: type, field: dataclasses.Field[Any]) -> inspect.Parameter:
    metadata = field.metadata
    kind = _type(cls, field)
    default = metadata["shown_default"] if metadata["read"] else field.default
    if default is dataclasses.MISSING or default == ():
        default = None
    info = typer.Option(
        *_flags(field),
        help=metadata["help"],
        envvar=metadata["env"],
        metavar=metadata["metavar"],
        min=metadata["minimum"],
        max=metadata["maximum"],
        hidden=metadata["hidden"],
        parser=read_path if Path in (kind, *get_args(kind)) or kind == list[Path] | None else None,
        rich_help_panel=_PANELS[cls],
    )
    return inspect.Parameter(
        f"{group}_{field.name}", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _read(field: dataclasses.Field[Any], value: Any) -> Any:
    """The field's value; None if the flag was not used. Raises `UserError`."""
    flag, metadata = _flags(field)[0], field.metadata
    if value is None or value == []:
        return None
    if metadata["read"]:
        try:
            return metadata["read"](value)
        except ValueError as error:
            raise UserError(f"{flag} {shown(value)}: {error}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag} {value:g}: use a finite number")
    if metadata["above"] is not None and value <= metadata["above"]:
        raise UserError(f"{flag} {value:g}: use a number above {metadata['above']:g}")
    if isinstance(value, list):
        return tuple(value) if field.default == () else read_pairs(value, flag)
    return value


def _prepared(options: ExecutionOptions, fields: Iterable[str]) -> ExecutionOptions:
    """The options with their plugins loaded, and with absolute plugin paths for other processes."""
    from harness.cli.folders import check_readable

    if "runs" in fields:
        check_readable("--runs", options.runs)
    if "device" in fields:
        check_device_name(options.device)
    if options.tracking is not None:
        check_tracking(options.tracking)
    environment_number("RANK", 0)
    environment_number("OMP_NUM_THREADS", 0)
    if "plugins" in fields and (options.plugins or os.environ.get("HARNESS_PLUGINS")):
        from harness.cells import plugins

        plugins.load(options.plugins)
        return dataclasses.replace(options, plugins=tuple(plugins.loaded_files()))
    return options
