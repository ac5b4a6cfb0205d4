import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from loraloom.cli.main import main
from loraloom.config.data import PromptForm
from loraloom.generation.generate import Conversation
from loraloom.generation.loading import load_host
from tests.generation.saved import save_tiny

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model with a chat template and room for 64 tokens, and two adapters."""
    return save_tiny(tmp_path_factory.mktemp("chat"), TEMPLATE, max_position_embeddings=64)


def chat(saved, monkeypatch, *lines, options=()):
    read = Mock(side_effect=[*lines, EOFError])
    monkeypatch.setattr("builtins.input", lambda prompt: print(prompt, end="") or read())
    adapters = [f"--adapter={name}={saved / name}" for name in ("lora", "mixlora")]
    base = ["--base-model", str(saved / "base"), "--max-new-tokens", "5", "--seed", "1"]
    return main(["chat", *base, *adapters, *options])


def test_commands_switch_and_forget(saved, monkeypatch, capsys):
    lines = ("one", "/adapter base", "one", "/reset", "/help")
    assert chat(saved, monkeypatch, *lines) == 0
    output = capsys.readouterr().out
    assert output.startswith("models: base, lora, mixlora; /help for commands\nmixlora> ")
    assert "base> " in output
    assert "/reset         start a new conversation" in output


def test_the_same_seed_gives_the_same_answers(saved, monkeypatch, capsys):
    outputs = []
    for _ in range(2):
        chat(saved, monkeypatch, "one", "/reset", "one", options=["--temperature", "1"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert len({*outputs[0].split("mixlora> ")}) == 5  # two answers among them


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adapter nobody", "error: /adapter requires base or lora or mixlora, got 'nobody'"),
        ("/adapter", "error: /adapter requires base or lora or mixlora, got ''"),
        ("/nothing here", "error: unknown command /nothing; type /help for the commands"),
        ("a " * 300, "error: this model's maximum context length is 64 tokens"),
    ],
)
def test_a_line_that_can_not_be_heeded_is_an_error_and_no_end(
    saved, monkeypatch, capsys, line, message
):
    assert chat(saved, monkeypatch, line, "/quit") == 0
    assert message in capsys.readouterr().out


def test_quit_ends_whatever_follows(saved, monkeypatch, capsys):
    assert chat(saved, monkeypatch, "/quit now", "/nothing", "/quit") == 0
    assert "unknown command" not in capsys.readouterr().out


@pytest.mark.parametrize("line", ["/etc/hosts is what?", "/x.txt", "/", " /nothing", " /quit"])
def test_a_path_or_what_follows_a_space_is_a_message(saved, monkeypatch, capsys, line):
    asked = []
    ask = Conversation.ask
    record = lambda self, text, *rest: asked.append(text) or ask(self, text, *rest)  # noqa: E731
    monkeypatch.setattr(Conversation, "ask", record)
    assert chat(saved, monkeypatch, line, "/quit") == 0
    assert asked == [line.strip()]
    assert "error" not in capsys.readouterr().out


def test_what_a_model_says_can_not_steer_the_terminal(saved, monkeypatch, capsys):
    monkeypatch.setattr(
        "loraloom.generation.sampling.TextStream.push", lambda self, token: "\x1b[2J"
    )
    chat(saved, monkeypatch, "one")
    assert "\x1b" not in capsys.readouterr().out


def test_a_slow_answer_is_waited_for(saved, monkeypatch, capsys):
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)
    monkeypatch.setattr("loraloom.generation.engine.time", later)
    assert chat(saved, monkeypatch, "one") == 0
    assert "error" not in capsys.readouterr().out


def test_a_system_prompt_needs_a_chat_template(saved, monkeypatch, capsys):
    template = saved / "base" / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    assert chat(saved, monkeypatch, options=["--system", "Be brief."]) == 2
    template.write_text(text)
    assert "--system requires a chat template" in capsys.readouterr().err


def test_adapters_of_texts_do_not_see_a_system_message(saved, monkeypatch, capsys):
    def load(*asked):
        host, tokenizer = load_host(*asked)
        host.adapters["lora"].prompt = PromptForm(format="text")
        return host, tokenizer

    monkeypatch.setattr("loraloom.cli.chat.load_host", load)
    assert chat(saved, monkeypatch, options=["--system", "Be brief."]) == 0
    assert "note: lora will not see --system" in capsys.readouterr().out
