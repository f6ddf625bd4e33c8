"""Guards: notice when something goes wrong in a run that is left alone overnight.

`grpo.policy_update` skips updates whose gradients are not finite. The guards count them, and the run stops after
`--max-skipped` in a row. Each sign that a policy no longer learns gives one warning with advice.
"""

import sys
import time
from dataclasses import dataclass

from common.options import check, option


@dataclass(frozen=True)
class GuardConfig:
    """Guards."""

    max_skipped: int = option(3, "stop after this many steps without a finite gradient", above=0)
    warn_flat_steps: int = option(10, "warn when all groups are flat for this many steps", above=0)
    warn_format_steps: int = option(3, "warn when this many steps have no valid completion", above=0)
    warn_kl: float = option(1.0, "warn when the KL to the reference is above this", above=0)
    warn_truncated: float = option(0.5, "warn when this share of completions is truncated", above=0)
    warn_sampler_gap: float = option(0.1, "warn when a token's log-probabilities in sampling and in training differ by "
                                          "more, on average", above=0)

    __post_init__ = check


class Guards:
    """Watches the metrics of the steps; a new process that resumes a run starts counting again."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self.skipped = self.flat = self.unformed = 0  # steps in a row
        self.warned: set[str] = set()

    def watch(self, metrics: dict) -> list[str]:
        """The warnings to print after a step with these metrics, each kind only once."""
        config, gap = self.config, metrics.get("sampler_gap", 0.0)
        self.skipped = self.skipped + 1 if metrics.get("skipped_updates") else 0
        self.flat = self.flat + 1 if metrics.get("flat_groups") == 1 else 0
        self.unformed = self.unformed + 1 if metrics.get("reward/format") == 0 else 0
        signs = {
            "format": self.unformed >= config.warn_format_steps
            and f"no completion of the last {self.unformed} steps had the format of --answer (by default "
                "`<think> reasoning </think> SQL`): all rewards are 0 and nothing is learned; teach it with --traces "
                "template and --cold-start-steps, mine traces with sft.py, or take SQL in a code fence with "
                "--lenient-format",
            "flat": self.flat >= config.warn_flat_steps
            and f"all groups were flat for {self.flat} steps, so nothing is learned: try a higher --temperature or "
                "--group-size, easier questions, or a longer cold start",
            "kl": metrics.get("kl", 0.0) > config.warn_kl
            and f"the KL to the reference is {metrics.get('kl', 0.0):.2f} nats a token: try a lower --lr or a higher "
                "--kl-coef",
            "truncated": metrics["truncated"] > config.warn_truncated
            and f"{metrics['truncated']:.0%} of the completions were truncated: try a higher --max-completion-tokens "
                "or a longer cold start",
            "sampler_gap": gap > config.warn_sampler_gap
            and f"a token's log-probabilities in sampling and in training differ by {gap:.2f} nats on "
                "average, where rounding to bf16 makes about 0.03: try a run with --precision float32, and if that is "
                "no better, --engine plain; --sampler-veto leaves out the completions that differ most"}
        if signs["format"]:  # it explains the others
            signs |= {"flat": False, "truncated": False}
        new = {kind: text for kind, text in signs.items() if text and kind not in self.warned}
        self.warned |= new.keys()
        return [f"warning, step {metrics['step']}: {text}" for text in new.values()]

    @property
    def must_stop(self) -> bool:
        """Whether too many steps in a row had no finite gradient."""
        return self.skipped >= self.config.max_skipped


class Heartbeat:
    """Prints one line per minute where no terminal shows the progress bar."""

    def __init__(self, seconds: float = 60.0, stream=None):
        self.seconds, self.stream = seconds, stream or sys.stdout
        self.last = time.monotonic()

    def beat(self, line: str) -> None:
        """Prints the line if the last one is old enough."""
        if self.stream.isatty() or time.monotonic() - self.last < self.seconds:
            return
        self.last = time.monotonic()
        print(line, file=self.stream, flush=True)


def describe_step(metrics: dict, steps: int) -> str:
    """The heartbeat's line for a step of `steps`."""
    if "reward" not in metrics:  # no database could be read
        return f"step {metrics['step']} of {steps}: no reward is known, {step_seconds(metrics):.1f} s a step"
    return (f"step {metrics['step']} of {steps}: reward {metrics['reward']:.2f}, accuracy of the samples "
            f"{metrics['execution_accuracy']:.2f}, {step_seconds(metrics):.1f} s a step")


def step_seconds(metrics: dict) -> float:
    """Seconds of a step's phases, without evaluations; `seconds/rewards/atomic` and the like are part of a phase."""
    return sum(value for name, value in metrics.items() if name.startswith("seconds/") and name.count("/") == 1)
