"""The learning rate as a function of the step alone: nothing of it has to be saved or restored."""

import math

from nasattn.config import Schedule


def rate(schedule: Schedule, step: int, *, epoch_steps: int, rung: int | None) -> float:
    """The rate of step `step` (from 0) on the way to the rung of so many epochs, where it ends.

    rung None: on the stable trunk, from which every rung branches off (`wsd` only).
    onecycle, cosine: up from a tenth of `lr` over the warm-up, then down along a cosine (onecycle:
    Smith & Topin 2019 as in torch's OneCycleLR, divisors 10 and 100).
    wsd: up, stable, then down by 1 - sqrt(t) (Hägele et al. 2024, section 3.3) over the rung's last
    `decay_epochs`. The warm-up is a share of the full schedule, the same for all rungs.
    """
    if schedule.schedule == "wsd":
        return schedule.lr * _stable(schedule, step, epoch_steps, rung)
    assert rung is not None
    steps = rung * epoch_steps
    rise = schedule.warmup * steps
    if schedule.schedule == "onecycle" and rise > 1 and steps - rise > 1:
        return _onecycle(schedule, step, steps)
    warm = round(rise)
    if step < warm:
        return schedule.lr * _rise(step, warm)
    return schedule.lr * _cosine(1.0, 0.0, min(1.0, (step - warm) / max(1, steps - warm)))


def _stable(schedule: Schedule, step: int, epoch_steps: int, rung: int | None) -> float:
    factor = _rise(step, round(schedule.warmup * schedule.epochs * epoch_steps))
    if rung is None:
        return factor
    decay = schedule.decay_epochs(rung) * epoch_steps
    gone = (step - rung * epoch_steps + decay) / decay
    # A short rung may branch off while the rate still rises: then the lower of the two holds.
    return min(factor, 1.0 - math.sqrt(min(1.0, max(0.0, gone))))


def _onecycle(schedule: Schedule, step: int, steps: int) -> float:
    top, low = schedule.lr, schedule.lr / 10
    peak = schedule.warmup * (steps + 1) - 1
    if step <= peak:
        return _cosine(low, top, step / peak)
    return _cosine(top, low / 100, min(1.0, (step - peak) / (steps - peak)))


def _rise(step: int, warm: int) -> float:
    return 0.1 + 0.9 * step / warm if step < warm else 1.0


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
