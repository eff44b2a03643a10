"""Groups of commands of which each is imported when it is run, so that help costs what Python costs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import click

from weightsmith.errors import did_you_mean


class LazyGroup(click.Group):
    """A group whose commands are named ``command``, each in a module of its own."""

    def __init__(self, name: str, *, verbs: Mapping[str, str], package: str, help: str | None = None) -> None:
        """List the commands.

        Args:
            name: the group's name.
            verbs: verb -> what it does, in one line.
            package: the package that holds a module for each verb.
            help: what the group is for.
        """
        super().__init__(name, help=help, context_settings={"help_option_names": ["-h", "--help"]})
        self._verbs = verbs
        self._package = package

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs, in their order."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb's module, and return its command."""
        if cmd_name not in self._verbs:
            return None
        command = importlib.import_module(f"{self._package}.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        if not self._verbs:
            return
        with formatter.section("Commands"):
            formatter.write_dl(list(self._verbs.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse what is no verb, with a suggestion."""
        if args and args[0] not in self._verbs:
            ctx.fail(f"there is no command {args[0]!r}{did_you_mean(args[0], self._verbs)}")
        return super().resolve_command(ctx, args)
