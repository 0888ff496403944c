"""What people are told of Ray's errors."""

from __future__ import annotations

import traceback

from ray.exceptions import ActorDiedError, RayTaskError

from cluster.ray_errors import explain
from engine.errors import BrokenModelError


def died_in_its_constructor(error: Exception) -> ActorDiedError:
    """As Ray tells of an actor whose constructor raised: the cause is there as text only."""
    text = "".join(traceback.format_exception(error))
    return ActorDiedError(RayTaskError("Engine.__init__", text, error, pid=1, ip="127.0.0.1"))


def raised(message: str) -> Exception:
    try:
        try:
            raise ValueError("cannot map an empty file")
        except ValueError as error:
            raise BrokenModelError(message) from error
    except BrokenModelError as error:
        return error


def test_an_error_of_a_constructor_is_told_without_its_traceback() -> None:
    death = died_in_its_constructor(raised("model.gguf is truncated; fetch it again"))
    assert "Traceback" in str(death) or "File" in str(death)
    assert explain(death) == "BrokenModelError: model.gguf is truncated; fetch it again"


def test_the_controllers_account_of_it_is_the_same() -> None:
    death = died_in_its_constructor(raised("model.gguf is truncated"))
    task = RayTaskError("Controller.wait_ready", "the whole traceback", death, pid=2, ip="127.0.0.1")
    assert explain(task) == "BrokenModelError: model.gguf is truncated"


def test_a_message_of_several_lines_stays_whole() -> None:
    death = died_in_its_constructor(raised("the checkpoint lacks:\n  layer 1\n  layer 2"))
    assert explain(death) == "BrokenModelError: the checkpoint lacks:\n  layer 1\n  layer 2"


def test_a_death_without_an_error_says_what_ray_says() -> None:
    assert explain(ActorDiedError()) == "The actor died unexpectedly before finishing this task."
    assert explain(ConnectionError("no Ray there")) == "ConnectionError: no Ray there"
