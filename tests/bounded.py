"""Work that must end soon and take little memory, whatever it was given. Time is the processor's: the machine may be busy."""

import resource
import signal
from contextlib import contextmanager

SECONDS, BYTES = 5.0, 256 * 2**20


@contextmanager
def bounded():
    """Fail if the work inside takes longer, or more memory, than any bad value may."""

    def too_long(*_):
        raise AssertionError(f"took longer than {SECONDS} s")

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before, handler = peak(), signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    assert peak() - before < BYTES
