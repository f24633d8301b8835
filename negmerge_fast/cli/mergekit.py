"""The command that merges with mergekit, and `merge --config`, which reads mergekit's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..core.errors import InputError

if TYPE_CHECKING:
    from ..streaming.job import Job

_Command = TypeVar("_Command", bound=Callable[..., Any])

# What a file of mergekit's tells of a merge.
_OF_A_CONFIG = (
    "base", "finetuned", "scale", "method", "density", "gamma", "over", "drop_rate", "seed", "mask_scale", "add", "weights",
    "min_agreement", "task_vectors", "adapters_as", "output_adapter",
)  # fmt: skip


def config_option(command: _Command) -> _Command:
    """Where the models and the method stand, if not on the command line."""
    return click.option(
        "--config",
        metavar="CONFIG.yml",
        help="Merge what this file of mergekit's says, in place of BASE, FINETUNED and --scale.",
    )(command)


def prepare_config(config: str, output: str, options: dict[str, Any]) -> Job:
    """Check the merge that a file describes. options: those of the command."""
    from ..integrations.mergekit_config import prepare

    return prepare(
        Path(config), output, **{name: value for name, value in options.items() if name not in _OF_A_CONFIG}
    )


def refuse_beside_config(context: click.Context) -> None:
    """Refuse arguments and options that a file of mergekit's tells, too."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") == click.core.ParameterSource.COMMANDLINE
        if given and parameter.name in _OF_A_CONFIG:
            name = (
                parameter.opts[0] if isinstance(parameter, click.Option) else parameter.make_metavar(context)
            )
            raise click.UsageError(f"{name}: the file of --config tells it, expected one of them only")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument(
    "arguments", nargs=-1, type=click.UNPROCESSED, metavar="CONFIG.yml OUT [OPTION OF mergekit-yaml]..."
)
def mergekit(arguments: tuple[str, ...]) -> None:
    """Merge with mergekit, which has negmerge among its methods here.

    CONFIG.yml is a file of mergekit's, of any of its methods, OUT a directory; `mergekit-yaml --help` prints the options. The merge, its
    memory and its output are mergekit's. It writes into OUT directly: what a stopped merge leaves there has no config.json.
    """
    try:
        from ..integrations import mergekit as plugin  # noqa: F401 registers the method
    except ImportError as error:
        raise InputError(_one_line(error)) from None
    with _refusals():
        from mergekit.scripts.run_yaml import main

        context = main.make_context("negmerge mergekit", list(arguments))
        check_config(Path(context.params["config_file"]))
        with context:
            main.invoke(context)


def check_config(path: Path) -> None:
    """Have mergekit read a file before it merges. Raises InputError with what it says."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import get

    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        get(config.merge_method)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RuntimeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {_one_line(error)}") from None


@contextmanager
def _refusals() -> Iterator[None]:
    """What mergekit refuses of its inputs and parameters is a user's mistake."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(f"mergekit: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """An error's message; of several found by pydantic the first, without the address of its manual."""
    listed = getattr(error, "errors", None)
    if listed is None:
        return " ".join(str(error).split()) or type(error).__name__
    first = listed()[0]
    keys = ".".join(map(str, first["loc"]))
    return f"{keys}: {first['msg']}" if keys else first["msg"]
