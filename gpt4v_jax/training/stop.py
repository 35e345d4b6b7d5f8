"""SIGTERM and SIGINT: the step in flight is finished and saved, and the process exits with a status that says so."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

PREEMPTED = 75  # exit status, EX_TEMPFAIL of sysexits.h: the same command again goes on
STOPPED = 3  # exit status: the guard stopped the run


class Interrupted(Exception):
    """Raised by `Stop.check` in work that may be left undone."""


class Stop:
    """While entered, SIGTERM and SIGINT are noted instead of obeyed; a second SIGINT interrupts at once.

    Several processes get the signal at different steps, or only one gets it, but must leave the loop at the same step:
    their answers ride on a device computation beside each step, which is read one step late.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._noted, self._interrupts = False, 0
        self._several = jax.process_count() > 1
        self._everywhere = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._asked = None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self._noted = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def asked(self) -> bool:
        """To be called once a step, by all processes: True at the same step in all of them."""
        if not self._several:
            return self._noted
        before = self._asked
        shape = (self._everywhere.num_devices,)
        flags = jax.make_array_from_callback(shape, self._everywhere, lambda at: np.full(1, self._noted))
        self._asked = self._any(flags)
        return before is not None and bool(before)

    def check(self) -> None:
        """Raises Interrupted when a lone process was asked to stop; several could not agree so quickly."""
        if self._noted and not self._several:
            raise Interrupted
