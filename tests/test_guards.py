"""guards.py: counts, warnings once, a line a minute."""

import io

import pytest

from running.guards import GuardConfig, Guards, Heartbeat, describe_step

FINE = {"step": 1, "skipped_updates": 0, "flat_groups": 0.5, "truncated": 0.0, "kl": 0.01, "reward/format": 0.9,
        "sampler_gap": 0.05}


def test_a_sound_run_is_not_warned_of():
    guards = Guards(GuardConfig())
    assert not any(guards.watch(FINE) for _ in range(50)) and not guards.must_stop


def test_steps_without_a_finite_gradient_stop_the_run_only_in_a_row():
    guards = Guards(GuardConfig(max_skipped=3))
    for skipped, stops in [(1, False), (1, False), (0, False), (1, False), (2, False), (1, True)]:
        guards.watch(FINE | {"skipped_updates": skipped})
        assert guards.must_stop == stops


@pytest.mark.parametrize("sign, steps, words", [
    ({"flat_groups": 1.0}, 10, "all groups were flat for 10 steps"),
    ({"kl": 1.5}, 1, "1.50 nats"),
    ({"truncated": 0.75}, 1, "75% of the completions"),
    ({"sampler_gap": 0.3}, 1, "in training differ by 0.30 nats"),
])
def test_each_sign_is_warned_of_once_with_a_remedy(sign, steps, words):
    guards = Guards(GuardConfig())
    told = [warning for _ in range(3 * steps) for warning in guards.watch(FINE | sign)]
    assert len(told) == 1 and words in told[0] and "try a" in told[0] and "--" in told[0]


def test_a_policy_that_never_meets_the_format_is_told_what_to_do_and_nothing_else():
    guards = Guards(GuardConfig())
    told = [warning for _ in range(30) for warning in guards.watch(
        FINE | {"reward/format": 0.0, "flat_groups": 1.0, "truncated": 1.0})]
    formats = [warning for warning in told if "<think> reasoning </think> SQL" in warning]
    assert len(formats) == 1 and all(flag in formats[0] for flag in ("--traces", "sft.py", "--lenient-format"))
    assert not any("temperature" in warning for warning in told)


def test_flat_steps_count_in_a_row():
    guards = Guards(GuardConfig(warn_flat_steps=2))
    told = [guards.watch(FINE | {"flat_groups": flat}) for flat in (1, 0.9, 1, 1)]
    assert [len(t) for t in told] == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["max_skipped", "warn_flat_steps", "warn_kl", "warn_truncated", "warn_sampler_gap"])
def test_a_guard_of_zero_is_refused(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is 0; it must be above 0"):
        GuardConfig(**{name: 0})


def test_a_heartbeat_is_printed_when_due_and_not_on_a_terminal():
    line = describe_step(FINE | {"reward": 2.5, "execution_accuracy": 0.25, "seconds/rollout": 1.0,
                                 "seconds/update": 0.5, "seconds/rewards/atomic": 9.0}, 40)
    out = io.StringIO()
    Heartbeat(0.0, out).beat(line)
    assert out.getvalue() == "step 1 of 40: reward 2.50, accuracy of the samples 0.25, 1.5 s a step\n"
    Heartbeat(3600.0, out).beat(line)
    assert out.getvalue().count("\n") == 1
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    Heartbeat(0.0, terminal).beat(line)
    assert terminal.getvalue() == ""
