"""Records that cannot be used: counted, said, and not too many of them."""

import sys
import threading
from collections.abc import Callable

from gpt4v_jax import config

SAID = 5  # bad records that are named, each in a line; the others are counted


class Bad:
    """Records that cannot be used: each is said or counted, and beyond a share of all of them the run stops."""

    def __init__(self, name: str, total: int, share: float, say: Callable[[str], None] | None = None):
        self._name, self._total, self._share = name, total, share
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._lock, self.where = threading.Lock(), {}

    def skip(self, where: str, why: object) -> None:
        """Raises InputError once they are more than the share. A record counts once, however often it is met."""
        with self._lock:
            if where in self.where:
                return
            self.where[where] = str(why)
            if len(self.where) <= SAID:
                self._say(f"skipped {where}: {why}")
            if len(self.where) > self._share * self._total:
                raise config.InputError(
                    f"{self._name}: {len(self.where)} of {self._total:,} records cannot be used, which is more than "
                    f"config.data.bad={self._share:.3g}; the last one is {where}: {why}. Mend the data, or raise it"
                )
