"""Shares the CPU's cores with other processes on the machine.

OpenMP threads that wait for one another spin for some milliseconds before they sleep. On free cores that is fastest.
While another process wants a core, each wait costs the core's whole time slice, and a training step takes many times as
long. GNU OpenMP, which PyTorch uses on Linux, spins only briefly once it manages more threads than there are cores. So
while cores are busy, `share_cores` holds idle teams of threads, and waiting threads sleep. The number of threads that
compute stays the same, and so does every bit of the results.
"""

import os
import threading
import time
from functools import cache
from pathlib import Path

import torch

OWN_POLICY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # variables that set how threads wait
PERIOD = 0.5  # seconds between two looks
MARGIN = 0.2  # cores that others may use before waiting threads sleep
QUIET = 3  # looks in a row with free cores before threads spin again
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100  # per second


@cache
def share_cores() -> None:
    """Follows the machine's load from now on, in a separate thread.

    Does nothing if the user has set how threads wait, if a single thread computes, or if the system does not report its
    load as Linux does.
    """
    if any(name in os.environ for name in OWN_POLICY) or torch.get_num_threads() == 1 or not _load_is_known():
        return
    threading.Thread(target=_follow, name="share_cores", daemon=True).start()


def _follow() -> None:
    waiting = Waiting(Load.now())
    while True:
        time.sleep(PERIOD)
        waiting.adapt(Load.now())


class Waiting:
    """How threads wait: `teams` is None while they spin."""

    def __init__(self, load: "Load"):
        self.load, self.teams, self.quiet = load, None, 0

    def adapt(self, load: "Load") -> None:
        """Lets threads sleep at once when cores are busy, and spin again after cores have been free for a while."""
        free = load.cores - load.others_since(self.load)
        crowded = free < torch.get_num_threads() - MARGIN
        self.load, self.quiet = load, 0 if crowded else self.quiet + 1
        if crowded and not self.teams:
            self.teams = IdleTeams(load.cores)
        elif self.teams and self.quiet == QUIET:
            self.teams.end()
            self.teams = None


class IdleTeams:
    """Idle teams of OpenMP threads, enough that OpenMP manages more threads than there are cores."""

    def __init__(self, cores: int):
        size = torch.get_num_threads()
        self.ended = threading.Event()
        teams = (cores - size) // (size - 1) + 1  # each adds size - 1 threads to the `size` that compute
        self.threads = [threading.Thread(target=self._hold, daemon=True) for _ in range(teams)]
        for thread in self.threads:
            thread.start()

    def _hold(self) -> None:
        torch.zeros(2**20).add_(1)  # large enough that all threads take part and form the team
        self.ended.wait()

    def end(self) -> None:
        """Ends the threads, and their teams with them."""
        self.ended.set()
        for thread in self.threads:
            thread.join()


class Load:
    """CPU seconds until now, of all processes on this process's cores and of this process with its children."""

    def __init__(self, cores: int, everyone: float, own: float):
        self.cores, self.everyone, self.own, self.time = cores, everyone, own, time.monotonic()

    @classmethod
    def now(cls) -> "Load":
        mine = {f"cpu{n}" for n in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        # user, nice, system; without interrupts, waiting, and other machines on the host
        everyone = sum(int(tick) for name, *ticks in lines if name in mine for tick in ticks[:3]) / TICKS
        return cls(len(mine), everyone, time.process_time() + _seconds_of_children())

    def others_since(self, before: "Load") -> float:
        """How many cores other processes have used since then, on average."""
        return (self.everyone - before.everyone - (self.own - before.own)) / (self.time - before.time)


def _seconds_of_children() -> float:
    """CPU seconds of this process's live children, its SQL workers."""
    total = 0
    for thread in Path("/proc/self/task").iterdir():  # the kernel lists them by the thread that started them
        try:
            children = (thread / "children").read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in children:
            try:
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()  # a name may hold spaces
            except OSError:  # it has ended
                continue
            total += int(fields[11]) + int(fields[12])  # in user and system mode
    return total / TICKS


def _load_is_known() -> bool:
    return hasattr(os, "sched_getaffinity") and Path("/proc/stat").is_file()
