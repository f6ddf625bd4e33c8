"""Sharing the CPU's cores with whatever else runs on the machine.

Threads of OpenMP that wait for one another spin for some milliseconds before they sleep. On free cores that is fastest.
While another process wants a core, each wait costs the core's whole time slice, and a training step takes many times as
long. GNU's OpenMP, which PyTorch for Linux has, spins only briefly once it manages more threads than there are cores.
So while the cores are not free, `share_cores` keeps idle teams of threads, and the others sleep where they wait. The
number of threads that compute stays the same, and with it every bit of the results.
"""

import os
import threading
import time
from functools import cache
from pathlib import Path

import torch

OWN_POLICY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # variables by which a user says how threads wait
PERIOD = 0.5  # seconds between two looks
MARGIN = 0.2  # cores that others may use before threads wait otherwise
QUIET = 3  # looks in a row that find the cores free before threads spin again
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100  # a second


@cache
def share_cores() -> None:
    """Follows the load of the machine from now on, in a thread of its own.

    Does nothing where the user has set how threads wait, where a single thread computes, and where the system does not
    report its load as Linux does.
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
        """Threads sleep at once when cores are missing, and spin again when that has not been so for a while."""
        free = load.cores - load.others_since(self.load)
        crowded = free < torch.get_num_threads() - MARGIN
        self.load, self.quiet = load, 0 if crowded else self.quiet + 1
        if crowded and not self.teams:
            self.teams = IdleTeams(load.cores)
        elif self.teams and self.quiet == QUIET:
            self.teams.end()
            self.teams = None


class IdleTeams:
    """So many teams of OpenMP threads that it manages more threads than there are cores. They do nothing."""

    def __init__(self, cores: int):
        size = torch.get_num_threads()
        self.ended = threading.Event()
        teams = (cores - size) // (size - 1) + 1  # each adds size - 1 threads to the `size` that compute
        self.threads = [threading.Thread(target=self._hold, daemon=True) for _ in range(teams)]
        for thread in self.threads:
            thread.start()

    def _hold(self) -> None:
        torch.zeros(2**20).add_(1)  # large enough that all threads take part, which makes the team
        self.ended.wait()

    def end(self) -> None:
        """Ends the threads, and their teams with them."""
        self.ended.set()
        for thread in self.threads:
            thread.join()


class Load:
    """Seconds of computing until now, of all processes on this process's cores and of this one with its children."""

    def __init__(self, cores: int, everyone: float, own: float):
        self.cores, self.everyone, self.own, self.time = cores, everyone, own, time.monotonic()

    @classmethod
    def now(cls) -> "Load":
        mine = {f"cpu{n}" for n in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        # user, nice, system; without the time of interrupts, of waiting, and of other machines on the host
        everyone = sum(int(tick) for name, *ticks in lines if name in mine for tick in ticks[:3]) / TICKS
        return cls(len(mine), everyone, time.process_time() + _seconds_of_children())

    def others_since(self, before: "Load") -> float:
        """How many cores other processes have used since then, on average."""
        return (self.everyone - before.everyone - (self.own - before.own)) / (self.time - before.time)


def _seconds_of_children() -> float:
    """Of this process's children, which are its SQL workers, that live."""
    total = 0
    for thread in Path("/proc/self/task").iterdir():  # the kernel lists them by the thread that began them
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
