"""The door of every command: flags and arguments in, one line and exit status 2 for bad input."""

import sys
from collections.abc import Callable

from absl import flags, logging

from gpt4v_jax import config


class Leave(Exception):
    """A command ends before its end, for a reason that is documented: one line on stderr and this exit status."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


def run(main: Callable[..., None], required: tuple[str, ...] = (), arguments: tuple[str, ...] = ()) -> None:
    """Parses absl's flags and calls main(). Bad input is one line on stderr and exit status 2, no traceback.

    Every command's __main__ is this call, so that bad input looks the same everywhere. arguments: names of what is
    given without a flag; main gets them.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        name = main.__module__
        listed = flags.FLAGS.main_module_help() if name == "__main__" else flags.FLAGS.module_help(name)
        print(sys.modules[name].__doc__, listed, sep="\n")
        sys.exit(0)
    try:
        given = _parse_flags(required, arguments)
        logging.set_verbosity(logging.ERROR)  # orbax and tfds tell their life at INFO and WARNING
        main(*given)
    except config.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Leave as reason:
        print(reason, file=sys.stderr)
        sys.exit(reason.status)


def _parse_flags(required: tuple[str, ...], arguments: tuple[str, ...]) -> list[str]:
    try:
        rest = flags.FLAGS(sys.argv)[1:]
    except (AttributeError, KeyError) as error:  # a key that a locked ConfigDict does not have; it names the nearest
        text = str(error.args[0]).replace("\\n", " ")
        text = " ".join(text.translate(str.maketrans("", "", "\\'\"")).split())
        key = text.split()[0]
        given = next((a.partition("=")[0] for a in sys.argv if a.partition("=")[0].endswith(f".{key}")), "")
        raise config.InputError(f"unknown config key {text}{given and f' in {given}'}") from error
    except (flags.Error, OSError, ValueError, TypeError) as error:
        raise config.InputError(" ".join(str(error).split())) from error
    if len(rest) > len(arguments):
        odd = rest[len(arguments)]
        raise config.InputError(f"unexpected argument {odd!r}: flags are written --name=value or --name value")
    if len(rest) < len(arguments):
        raise config.InputError(f"{arguments[len(rest)]} is missing: --help says what it is")
    for name in required:
        if flags.FLAGS[name].value is None:
            raise config.InputError(f"--{name} is missing: --help lists the flags")
    return rest
