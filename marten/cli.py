"""What every command shares: how flags are spelt and how errors are told.

Imports neither torch nor anything slow, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import tomllib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from marten.errors import FAILED, INTERRUPTED, MISUSED, MartenError, UsageError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `--batch-size` for `--batch_size`, and never an abbreviation.

    `--debug` is always there: it prints the traceback behind an error. With `config=True`, `--config FILE` reads
    defaults for any flag from a TOML file; flags on the command line win.
    """

    def __init__(self, *args: Any, config: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Formatter, **kwargs, "allow_abbrev": False})
        self._takes_config = config
        # without a default, a verb's own parser does not take back what was said before the verb
        told = "print the traceback behind an error"
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=told)
        if config:
            self.add_argument("--config", type=Path, metavar="TOML", help="flags by name; the command line wins")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does, after spelling flags with underscores and reading `--config`."""
        words = [underscored(word) for word in (sys.argv[1:] if args is None else args)]
        if self._takes_config:
            finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            finder.add_argument("--config", type=Path)
            path = finder.parse_known_args(words)[0].config
            if path is not None:
                words = self._words_of(path) + words
        return super().parse_known_args(words, namespace)

    def _words_of(self, path: Path) -> list[str]:
        """Turn a TOML file into the words that the same flags would be on the command line."""
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"--config {path}: {error.strerror}")
        except tomllib.TOMLDecodeError as error:
            self.error(f"--config {path} is not TOML: {error}")
        flags = {word[2:]: action for action in self._actions for word in action.option_strings if word[:2] == "--"}
        words: list[str] = []
        for key, value in settings.items():
            action = flags.get(underscored(f"--{key}")[2:])
            if action is None or key == "config":
                self.error(f"--config {path}: unknown key {key!r}; known: {', '.join(sorted(flags))}")
            if action.nargs == 0:
                if not isinstance(value, bool):
                    self.error(f"--config {path}: {key} is true or false, found {value!r}")
                words += [action.option_strings[-1]] if value else []
            else:
                values = value if isinstance(value, list) else [value]
                words += [action.option_strings[-1], *(str(v) for v in values)]
        return words


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=112)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help or ""
        if "default" in told or action.default in (None, False, "", [], argparse.SUPPRESS) or action.required:
            return told
        if isinstance(action.default, (list, tuple)):
            return f"{told} (default: {' '.join(map(str, action.default))})"
        return f"{told} (default: %(default)s)"


def underscored(word: str) -> str:
    """Spell a long flag with underscores: --batch-size=4 becomes --batch_size=4; everything else stays."""
    if not word.startswith("--") or len(word) == 2:
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def run(main: Callable[[argparse.Namespace], int | None], parser: Parser) -> NoReturn:
    """Parse the command line, run `main`, and end the process with the project's exit codes.

    0 done, 85 checkpointed, 1 failed, 2 misused, 130 interrupted; one line on stderr for a MartenError, a traceback
    only with --debug.
    """
    args = parser.parse_args()
    try:
        code = main(args) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except MartenError as error:
        if "debug" in args:
            traceback.print_exc()
        print(f"{parser.prog}: {error}", file=sys.stderr)
        code = MISUSED if isinstance(error, UsageError) else FAILED
    if one_of_several():
        _leave(code)
    sys.exit(code)


def one_of_several() -> bool:
    """Whether torchrun or srun started this process as one of a run's."""
    return "WORLD_SIZE" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ


def _leave(code: int) -> NoReturn:
    """End without taking the interpreter down: gloo's threads may meet it half gone, and abort with the work done."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
