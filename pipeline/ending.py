"""How a command ends that does not end well: one sentence on the terminal, and an exit status."""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Any

import typer
from typer.core import TyperGroup

from pipeline.devices import is_main_process
from schemas.errors import UserError

LAST_WORD_S = 3.0
"""Seconds in which a launcher ends the other processes when the main one has ended with the same mistake."""


class Commands(TyperGroup):
    """Prints a user's mistake as one sentence, with exit status 2; ``--debug`` shows where it was found."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except UserError as error:
            if ctx.params.get("debug"):
                raise
            _echo_error(str(error))
            ctx.exit(2)
        except OSError as error:  # no room, no permission, a file where a folder should be
            if ctx.params.get("debug") or error.errno in (None, errno.EPIPE):
                raise
            _echo_error(os_sentence(error))
            ctx.exit(2)
        except KeyboardInterrupt as asked:
            kept = "; finished shards are kept: run it again to go on"
            if is_main_process():
                typer.secho(f"stopped{kept if ctx.invoked_subcommand == 'cache-features' else ''}", err=True)
            ctx.exit(128 + (asked.args or (signal.SIGINT,))[0])


def stop(number: int, frame: object) -> None:
    """A scheduler's SIGTERM ends a command as Ctrl-C does: locks and temporary files go with it."""
    raise KeyboardInterrupt(number)


def _echo_error(sentence: str) -> None:
    """One line. Of several processes the main one speaks; another only of what did not end the main one, too."""
    if is_main_process():
        typer.secho(f"error: {sentence}", fg="red", err=True)
        return
    try:
        time.sleep(LAST_WORD_S)
    except KeyboardInterrupt:  # the launcher's SIGTERM: the main process has said it
        return
    typer.secho(f"rank {os.environ['RANK']}: error: {sentence}", fg="red", err=True)


def os_sentence(error: OSError) -> str:
    """What the system refused, and where."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; what was there before is as it was"
