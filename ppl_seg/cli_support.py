"""What all commands share: one-line errors with their exit codes, messages, tables on screen."""

from __future__ import annotations

import functools
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from ppl_seg.errors import InputError

FAILED, NOTHING_DONE, INTERRUPTED = 1, 2, 130  # exit codes
OUT_OF_MEMORY = "free some, use a larger machine, a larger --spacing or fewer inputs; --verbose says what is needed"
_WIDTH_OF_A_PIPE = 200  # columns of a table where stdout is no terminal


def guarded(command: Callable[..., int | None]) -> Callable[..., None]:
    """A command that ends with an exit code and, where it failed, one line on stderr; no traceback.

    The command returns its exit code (None: 0). InputError, files that cannot be read or written, no memory: 2; other
    exceptions: 1; Ctrl-C: 130. `threads` and `verbose` among its arguments are dealt with here.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        verbose = bool(kwargs.get("verbose"))
        try:
            with _messages(verbose):
                if kwargs.get("threads"):
                    import torch

                    torch.set_num_threads(kwargs["threads"])
                code = command(*args, **kwargs) or 0
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except InputError as error:
            fail(str(error), NOTHING_DONE, verbose)
        except OSError as error:
            reason = error.strerror or str(error)
            fail(f"{error.filename}: {reason}" if error.filename else reason, NOTHING_DONE, verbose)
        except Exception as error:
            from ppl_seg.api.resources import is_out_of_memory

            if is_out_of_memory(error):
                fail(f"out of memory; {OUT_OF_MEMORY}", NOTHING_DONE, verbose)
            hint = "" if verbose else "; use --verbose for the traceback"
            fail(f"{type(error).__name__}: {error}{hint}", FAILED, verbose)
        raise typer.Exit(code)

    return run


def fail(message: str, code: int, verbose: bool = False) -> NoReturn:
    """One line on stderr, after the current exception's traceback if `verbose`, and the exit code."""
    if verbose:
        import traceback

        traceback.print_exc()
    say(message)
    raise typer.Exit(code)


def say(message: str) -> None:
    """One line on stderr, so that stdout holds results alone."""
    from rich.console import Console

    line = re.sub(r"\s*\n\s*", " ", f"ppl-seg: {message}".rstrip())
    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)


def watched() -> bool:
    """Whether somebody sees a progress bar."""
    return sys.stderr.isatty()


def show_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], numbers: Sequence[str] = ()) -> None:
    """A table on stdout; `numbers` are columns aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_plain(row.get(column)) for column in columns))
    Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE).print(table)


def show_summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """The summary of `evaluate` on stdout: a mean and its 95 % interval in one cell."""
    metrics = {"Dice": ("dice", 3), "HD95 mm": ("hd95_mm", 2), "surface distance mm": ("asd_mm", 2)}
    columns = ("structure", "scans", *metrics, "missed")
    cells = [dict(row) for row in rows]
    for row in cells:
        for title, (metric, digits) in metrics.items():
            mean, low, high = (row[f"{metric}{end}"] for end in ("", "_low", "_high"))
            interval = "" if math.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"  # of one person
            row[title] = "" if math.isnan(mean) else f"{mean:.{digits}f}{interval}"
    show_table(columns, cells, numbers=columns[1:])


def _plain(value: Any) -> Any:
    from rich.text import Text  # paths may hold what rich takes for markup

    return Text("" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value))


class _Lines(logging.Handler):
    """What the library tells the user, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def _messages(verbose: bool) -> Iterator[None]:
    """Show what the library logs; warnings of other libraries with `verbose` only."""
    logger, handler = logging.getLogger("ppl_seg"), _Lines()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(str(message))
            warnings.simplefilter("default" if verbose else "ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
