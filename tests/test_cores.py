"""Threads wait so that other processes get on, and a run gives the same results."""

import threading
import time
from pathlib import Path

import pytest
import torch

from engine import cores
from engine.cores import IdleTeams, Load, Waiting


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def load(cores: int, time: float, everyone: float, own: float) -> Load:
    found = Load(cores, everyone, own)
    found.time = time
    return found


def test_others_are_all_but_this_process():
    before, after = load(2, 10.0, 100.0, 40.0), load(2, 12.0, 103.0, 41.0)
    assert after.others_since(before) == 1.0  # 3 s of computing in 2 s, of which 1 is ours


def test_load_counts_what_this_process_computes_as_its_own():
    before = Load.now()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = Load.now()
    assert after.own - before.own >= 0.3
    assert after.everyone - before.everyone >= 0.25  # in ticks, so a little less may be seen
    assert after.cores >= 1


def test_threads_sleep_while_cores_are_missing_and_spin_again_after_a_while(two_threads, monkeypatch):
    class Teams:
        def __init__(self, cores):
            assert cores == 2

        def end(self):
            pass

    monkeypatch.setattr(cores, "IdleTeams", Teams)
    waiting, everyone, slept = Waiting(load(2, 0.0, 0.0, 0.0)), 0.0, []
    for second, others in enumerate([0.1, 0.9, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0], start=1):
        everyone += 1 + others  # each second we compute one
        waiting.adapt(load(2, float(second), everyone, float(second)))
        slept.append(waiting.teams is not None)
    assert slept == [False, True, True, True, True, True, True, False, False]


def test_a_free_core_for_each_thread_is_enough(two_threads, monkeypatch):
    monkeypatch.setattr(cores, "IdleTeams", lambda cores: pytest.fail("threads need not sleep"))
    waiting = Waiting(load(8, 0.0, 0.0, 0.0))
    waiting.adapt(load(8, 1.0, 8.0, 2.0))  # six of eight cores are used by others, two threads by us


@pytest.mark.parametrize("count", [2, 3, 5])
def test_idle_teams_make_more_threads_than_cores_and_end(count, two_threads):
    def tasks() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    x = torch.randn(256, 256)
    result, before = x @ x, tasks()  # the team that computes is there
    teams = IdleTeams(count)
    for _ in range(200):
        if tasks() >= before + 2 * (count - 1):
            break
        time.sleep(0.01)
    # a team a thread: each manages one thread more than its own, and 2 + (count - 1) > count
    assert tasks() == before + 2 * (count - 1)
    assert torch.equal(x @ x, result)
    teams.end()
    for _ in range(200):
        if tasks() == before:
            break
        time.sleep(0.01)
    assert tasks() == before


@pytest.mark.parametrize("name", cores.OWN_POLICY)
def test_a_policy_of_the_users_own_stays(name, two_threads, monkeypatch):
    monkeypatch.setenv(name, "1")
    cores.share_cores.__wrapped__()
    assert "share_cores" not in {thread.name for thread in threading.enumerate()}


def test_a_single_thread_has_nobody_to_wait_for(monkeypatch):
    for name in cores.OWN_POLICY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    cores.share_cores.__wrapped__()
    assert "share_cores" not in {thread.name for thread in threading.enumerate()}
