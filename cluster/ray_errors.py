"""Ray's errors in words for people."""

from __future__ import annotations

import re

from ray.exceptions import RayActorError, RayTaskError

_RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Exit|Interrupt): )")
"""The line of a traceback that names the exception; frames are indented."""


def explain(error: Exception) -> str:
    """The cause of a Ray error in one line; its traceback is in the log of the process that raised it."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return explain(error.cause)
    if isinstance(error, RayActorError):
        return _cause_of_death(str(error))
    return f"{type(error).__name__}: {error}"


def _cause_of_death(text: str) -> str:
    """What an actor's constructor raised: Ray tells it as the end of a traceback, which may have several lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "an actor died, and Ray does not say why"
    raised = [number for number, line in enumerate(lines) if _RAISED.match(line)]
    if not raised:
        return lines[-1].strip()
    return "\n".join([_RAISED.sub(r"\1", lines[raised[-1]]), *lines[raised[-1] + 1 :]])
