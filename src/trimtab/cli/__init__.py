"""The command line: `trimtab COMMAND`. It only calls the public API."""

from trimtab.cli.app import main

__all__ = ["main"]
