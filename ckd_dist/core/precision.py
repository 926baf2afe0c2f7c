"""The number type that a command computes in: what `--amp auto` becomes on the devices at hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from ckd_dist.core import console, dist
from ckd_dist.core.identity import saved_options
from ckd_dist.core.options import Amp

RunConfig = TypeVar("RunConfig", bound=Any)
"""A dataclass of options with the field `amp`."""

_BEST_LAST: tuple[Amp, ...] = ("off", "float16", "bfloat16")


def is_native(amp: Amp) -> bool:
    """Whether this process's device computes in the type of `amp` itself. One that emulates it, as AVX2 and Pascal do
    with bfloat16, is slower than in float32, on CPUs ten times."""
    if amp == "off":
        return True
    if torch.cuda.is_available():
        return amp == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2"):  # what torch uses, not what there is
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    return any(found and name.endswith({"bfloat16": "bf16", "float16": "fp16"}[amp]) for name, found in known.items())


def automatic() -> Amp:
    """What `auto` becomes: bfloat16 where every rank's device has it, else float16 on GPUs, off on CPUs; collective."""
    own: Amp = "bfloat16" if is_native("bfloat16") else "float16" if torch.cuda.is_available() else "off"
    return min(dist.gather_objects(own), key=_BEST_LAST.index)


def resolve_amp(amp: Amp, kept: Amp | None = None) -> Amp:
    """`amp`, or what auto becomes: what was `kept` of an earlier run of the command, else `automatic`; collective.
    Warns of a type that is emulated."""
    amp = (kept or automatic()) if amp == "auto" else amp
    if not all(dist.gather_objects(is_native(amp))):
        _warn(amp)
    return amp


@cache
def _warn(amp: Amp) -> None:
    """Once a command, however many students it trains."""
    console.say(f"warning: this device has no {amp} of its own and emulates it: --amp off, float32, is faster")


def resolve(config: RunConfig, folder: str | Path) -> RunConfig:
    """The configuration of a run, with `amp` resolved: as the run in `folder` began, if there is one; collective."""
    kept = dist.on_main(lambda: saved_options(Path(folder)).get("amp"))
    return replace(config, amp=resolve_amp(config.amp, kept))


def words(amp: str) -> str:
    """The type, as a message names it."""
    return "float32" if amp == "off" else amp
