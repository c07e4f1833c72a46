"""Prints how the learning rate of a resumed run continues if its length or schedule has changed."""

from llama_jax.config.run import Config
from llama_jax.runtime.console import print_status


def print_schedule_change(config: Config, previous: Config, saved_steps: list[int]) -> None:
    """Prints one line if the remaining steps have another learning rate than planned before.

    Args:
        config: of the run, from now on.
        previous: of the run, until now.
        saved_steps: the steps of the run's checkpoints, at least one. It resumes from the last.
    """
    if max(saved_steps) < config.training.steps:
        text = describe_schedule_change(config, previous, saved_steps)
        if text:
            print_status(f"{config.training.out}: {text}")


def describe_schedule_change(
    config: Config, previous: Config, saved_steps: list[int]
) -> str | None:
    """Returns the text that `print_schedule_change` prints, or None if nothing has changed."""
    done, steps = max(saved_steps), config.training.steps
    new, old = config.optimizer, previous.optimizer
    if (new.schedule, new.decay_steps, new.final_lr_fraction, steps) == (
        old.schedule, old.decay_steps, old.final_lr_fraction, previous.training.steps,
    ):  # fmt: skip
        return None
    decayed_after = previous.training.steps - old.decay_steps
    if old.decay_steps and done > decayed_after:
        earlier = [step for step in saved_steps if step <= decayed_after]
        advice = "no checkpoint from before the decay is retained (checkpoint.keep_every)"
        if earlier:
            advice = (
                "to continue from before the decay, resume a copy of the run folder without the"
                f" checkpoints after step {max(earlier)}"
            )
        return (
            f"the learning rate has decayed since step {decayed_after}, and the run continues from"
            f" the decayed weights of step {done}; {advice}"
        )
    if new.schedule != old.schedule:
        return (
            f"step {done + 1} and later ones have the learning rate of the schedule {new.schedule};"
            f" the {done} steps done had that of {old.schedule}"
        )
    if new.schedule == "cosine" and steps == previous.training.steps:
        return (
            f"a cosine falls to final_lr_fraction of peak_lr, now {new.final_lr_fraction} instead"
            f" of {old.final_lr_fraction}: the learning rate of step {done + 1} and later ones"
            " changes"
        )
    if new.schedule == "cosine":
        return (
            f"a cosine extends over all training.steps, now {steps} instead of"
            f" {previous.training.steps}: the learning rate of step {done + 1} and later ones"
            " changes"
        )
    start = steps - new.decay_steps
    if not new.decay_steps:
        return None  # the rate stays at peak_lr
    if start < done:
        return (
            f"a decay over the last {new.decay_steps} of {steps} steps starts after step {start},"
            f" but {done} steps are done: the learning rate drops at once in step {done + 1}"
        )
    return f"the learning rate decays after step {start}, until step {steps}"
