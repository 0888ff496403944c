import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from cluster.commands.chat import chat
from tests.cluster.inference_double import Double, answer_ids, answer_text, chat_text, serve


@pytest.fixture(scope="module")
def double():
    with serve(Double()) as double:
        yield double


def run(double, *arguments, **options):
    return CliRunner().invoke(chat, [*arguments, "--address", double.address], **options)


def expected(*messages, num_tokens=4):
    """What the double answers to messages like `user:hi`."""
    text = "".join(f"<{role}>{content}\n" for role, _, content in (each.partition(":") for each in messages))
    return answer_text(answer_ids([ord(each) for each in text + "<assistant>"], num_tokens))


def test_one_question(double):
    result = run(double, "-m", "hi", "--max-tokens", "2")
    assert result.exit_code == 0
    assert result.stdout == expected("user:hi", num_tokens=2) + "\n"
    assert result.stderr == ""


def test_one_question_may_begin_with_a_slash(double):
    assert run(double, "-m", "/reset").stdout == expected("user:/reset") + "\n"


def test_sampling_is_the_servers_default_unless_given(double):
    run(double, "-m", "hi")
    assert not double.requests[-1].sampling.ListFields()
    run(double, "-m", "hi", "--temperature", "0.7", "--seed", "3")
    assert double.requests[-1].sampling.temperature == 0.7


def test_piped_lines_are_one_conversation_and_only_answers_are_printed(double):
    first = expected("user:a")
    second = expected("user:a", f"assistant:{first}", "user:b")
    result = run(double, input="a\n\nb\r\n")
    assert result.stdout == f"{first}\n{second}\n"
    assert result.stderr == ""


def test_commands_in_the_pipe(double):
    script = "/system be short\na\n/reset\na\n/system\na\n/timing on\na\n/quit\nnever\n"
    short = expected("system:be short", "user:a")
    plain = expected("user:a")
    after = expected("user:a", f"assistant:{plain}", "user:a")
    result = run(double, input=script)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [short, short, plain, after]
    assert "first decode step" in result.stderr


def test_json_is_an_object_a_line(double):
    result = run(double, "--json", input="a\nb\n")
    first, second = [json.loads(line) for line in result.stdout.splitlines()]
    assert (first["question"], first["text"]) == ("a", expected("user:a"))
    assert second["question"] == "b"


@pytest.mark.parametrize("line", ["/rest", "/timing maybe", "/quit now"])
def test_an_unknown_command_in_the_pipe_ends_it(double, line):
    result = run(double, input=f"a\n{line}\nb\n")
    assert result.exit_code == 1
    assert f"unknown command '{line}'" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_an_error_ends_a_pipe():
    with serve(Double()) as double:
        pass
    result = run(double, input="a\nb\n")
    assert result.exit_code == 1
    assert "no pdserve answers" in result.stderr


class Terminal:
    """The command at a pseudo-terminal, as a person uses it."""

    def __init__(self, double: Double, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        # A shell that runs these tests in the background has them, and what they start, ignore Ctrl-C.
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from cluster.commands.chat import chat; chat(sys.argv[1:])"
        )
        command = [sys.executable, "-c", code, "--address", double.address, *arguments]
        environment = {**os.environ, "TERM": "dumb", "GRPC_VERBOSITY": "NONE"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str) -> str:
        """What was shown up to `text`; that much is then forgotten."""
        give_up_at = time.monotonic() + 15
        while text not in self.seen:
            assert self._more(give_up_at - time.monotonic()), f"waited 15 s for {text!r}, saw {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def interrupt_at_prompt(self) -> None:
        """Ctrl-C until it is heard: readline misses one that comes between its prompt and its wait for keys."""
        assert not self.seen
        for _ in range(30):
            self.interrupt()
            if self._more(0.5):
                return
        raise AssertionError("no Ctrl-C at the prompt was heard")

    def _more(self, timeout_s: float) -> bool:
        """Add what is shown next to `seen`; False if there is nothing in time."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, timeout_s))
        if ready:
            self.seen += os.read(self._master, 65536).decode()
        return bool(ready)

    def close(self) -> int:
        status = self.process.wait(10)
        os.close(self._master)
        return status


def test_at_a_terminal(double):
    terminal = Terminal(double)
    terminal.wait_for("/quit\r\n")
    terminal.wait_for("> ")
    terminal.type("a\n")
    terminal.wait_for(expected("user:a"))
    terminal.wait_for("first decode step")
    terminal.wait_for("> ")
    terminal.type("/timing off\n")
    terminal.type("/rest\n")
    terminal.wait_for("unknown command '/rest'")
    terminal.type("/quit\n")
    assert terminal.close() == 0


def test_ctrl_c_cancels_the_answer_not_the_program():
    with serve(Double(step_s=0.05)) as double:
        terminal = Terminal(double, "--max-tokens", "1000", "--no-timing")
        terminal.wait_for("> ")
        terminal.type("count\n")
        terminal.wait_for(" w")
        terminal.wait_for(" w")
        terminal.interrupt()
        terminal.wait_for("(cancelled)")
        assert double.cancelled.wait(5)
        double.step_s = 0.0
        terminal.wait_for("> ")
        terminal.interrupt_at_prompt()
        terminal.wait_for("> ")
        terminal.type("go on\n")
        terminal.wait_for(" w")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.close() == 0
        asked = chat_text(double.requests[-1].chat)
    assert asked.startswith("<user>count\n<assistant> w")
    assert asked.endswith("<user>go on\n<assistant>")
