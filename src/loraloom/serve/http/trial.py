"""Compile grammars in a process that may die of them.

A chain of references in a JSON schema overflows the stack of llguidance, and a multiple of a large
number takes gigabytes, whatever limits it has. This module imports little else.
"""

import math
import os
import re
import signal
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import llguidance

# Less than any thread of the server has, so that what fits here fits there.
_STACK_BYTES = 1 << 20
# What one grammar may take, in addition to what there is.
_MAX_BYTES = 64 << 20
_MAX_CPU_S = 1
_LIMITS = llguidance.LLParserLimits(
    max_grammar_size=100_000, max_lexer_states=20_000, verbose_errors=False
)
# Where an error begins to repeat the grammar.
_EXCERPT = re.compile(r"\n\s*\d+ \| ")


def compile_grammar(tokenizer: Any, grammar: str) -> Any:
    written = llguidance.LLMatcher.grammar_from_lark(grammar)
    return llguidance.LLMatcher(tokenizer, written, log_level=0, limits=_LIMITS)


def reason(matcher: Any) -> str:
    """Say why a matcher can't be used, without the grammar."""
    error = " ".join(_EXCERPT.split(matcher.get_error())[0].split())
    return error if len(error) <= 300 else f"{error[:200]} … {error[-100:]}"


def _bound_process() -> None:
    """Let the process die if the next grammar needs too much."""
    import resource

    _, hard_s = resource.getrlimit(resource.RLIMIT_CPU)
    cpu_s = math.ceil(time.process_time()) + _MAX_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, hard_s))
    num_pages = int(Path("/proc/self/statm").read_text().split()[5])
    _, hard_bytes = resource.getrlimit(resource.RLIMIT_DATA)
    num_bytes = num_pages * resource.getpagesize() + _MAX_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, hard_bytes))


def answer(pipe: Connection, settings: dict[str, Any]) -> None:
    """Answer each grammar with why it can't be used, or an empty text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crash is an answer, and not for the log
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_answer, args=[pipe, settings])
    thread.start()
    thread.join()


def _answer(pipe: Connection, settings: dict[str, Any]) -> None:
    tokenizer = llguidance.LLTokenizer(**settings)
    pipe.send("")  # ready
    with suppress(EOFError):  # when the server has ended
        while True:
            grammar = pipe.recv()
            with suppress(ImportError, OSError, ValueError):  # not on every system
                _bound_process()
            matcher = compile_grammar(tokenizer, grammar)
            matcher.compute_logit_bias()
            pipe.send(reason(matcher))
