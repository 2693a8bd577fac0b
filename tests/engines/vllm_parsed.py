"""Run with vLLM: reads commands, a line each, and says of each what vLLM's own parser makes of it.

Input: a file of JSON, a list of lists of words after `vllm`. Output: a list of the arguments that
each has, or what is wrong with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser


def parsed(words: list[str]) -> dict[str, str] | str:
    parser = FlexibleArgumentParser(prog="vllm", exit_on_error=False)
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers())
    try:
        args = parser.parse_args(words)
        command.validate(args)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return {name: str(value) for name, value in vars(args).items()}


if __name__ == "__main__":
    asked, said = map(Path, sys.argv[1:])
    said.write_text(json.dumps([parsed(words) for words in json.loads(asked.read_text())]))
