"""The command line and the environment variables, from what `--help` prints and from the options' own definitions."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import typer
from markup import code, escaped, table

from harness.cli import main
from harness.engine.options import ExecutionOptions
from harness.launch.local import LocalLauncher
from harness.launch.ray import RayLauncher
from harness.launch.slurm import SlurmLauncher


def commands() -> str:
    """Every command: what it does, its arguments and options by section, an example."""
    main._add_commands()
    group = typer.main.get_command(main.app)
    assert isinstance(group, typer.core.TyperGroup)
    context = typer.Context(group, info_name="harness", max_content_width=1000)
    names = sorted(name for name, command in group.commands.items() if not command.hidden)
    return "\n\n".join(_command(name, group.commands[name], context) for name in names)


def _command(name: str, command: Any, above: typer.Context) -> str:
    context = typer.Context(command, info_name=name, parent=above, max_content_width=1000)
    usage = command.get_usage(context).removeprefix("Usage: ")
    parts = [f"## {name}", escaped(inspect.cleandoc(command.help or "")), f"```\n{usage}\n```"]
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in record[0]:
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            sections.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(record)
    order = ("Arguments", "Cell", "Launcher", "Execution", "Options")
    for title in sorted(sections, key=order.index):
        rows = [(code(flags), escaped(meaning)) for flags, meaning in sections[title]]
        parts.append(table((title, "meaning"), rows))
    if example := getattr(command.callback, "example", ""):
        parts.append(f"Example:\n\n```\n{example}\n```")
    return "\n\n".join(parts)


def launchers() -> str:
    """The options of `--launcher-set`."""
    parts = []
    for launcher in (LocalLauncher, RayLauncher, SlurmLauncher):
        if launcher.defaults:
            rows = [
                (code(name), code("" if default is None else str(default)), escaped(meaning))
                for name, (default, meaning) in launcher.defaults.items()
            ]
            title = f"**`--launcher {launcher.name}`**"
            parts.append(f"{title}\n\n{table(('`--launcher-set`', 'default', 'meaning'), rows)}")
    return "\n\n".join(parts)


def options() -> str:
    """The fields of `ExecutionOptions`."""
    rows = [
        (code(field.name), code("" if field.default is None else str(field.default)), escaped(field.metadata["help"]))
        for field in dataclasses.fields(ExecutionOptions)
    ]
    return table(("field", "default", "meaning"), rows)


def environment() -> str:
    """The variables that stand for a flag."""
    rows = []
    for field in dataclasses.fields(ExecutionOptions):
        if variable := field.metadata.get("env"):
            rows.append((code(variable), code(f"--{field.name.replace('_', '-')}"), escaped(field.metadata["help"])))
    return table(("variable", "flag", "meaning"), rows)
