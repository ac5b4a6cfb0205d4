"""What others' clients do: `python clients.py CLIENT URL TOKENIZER`; 77: not installed."""

import sys
from typing import Any, Literal

from pydantic import BaseModel

QUESTION: Any = [{"role": "user", "content": "What color is the sky?"}]
LONG: Any = [{"role": "user", "content": "sky " * 2000}]


class Paint(BaseModel, extra="forbid"):  # or random weights never end
    """Paint something."""

    color: Literal["blue", "red"]


def run_openai(url: str, tokenizer: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    scored: Any = client.completions.create(
        model="lora", prompt="the sky", max_tokens=0, logprobs=1, echo=True
    )
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    answer = client.chat.completions.create(model="lora", messages=QUESTION, max_tokens=4)
    assert answer.choices[0].finish_reason in ("length", "stop")


def run_litellm(url: str, tokenizer: str) -> None:
    import litellm

    settings: Any = {"model": "openai/lora", "api_base": url, "api_key": "none"}
    answer: Any = litellm.completion(messages=QUESTION, max_tokens=4, **settings)
    assert 0 < answer.usage.completion_tokens <= 4
    try:
        litellm.completion(messages=LONG, num_retries=0, **settings)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("a prompt that is too long was answered")


def run_langchain_openai(url: str, tokenizer: str) -> None:
    from langchain_openai import ChatOpenAI

    chat: Any = ChatOpenAI(model="lora", base_url=url, api_key="none", max_tokens=100)
    made = chat.with_structured_output(Paint, method="function_calling").invoke("Paint the sky")
    assert isinstance(made, Paint)
    (call,) = chat.bind_tools([Paint], tool_choice="any").invoke("Paint the sky").tool_calls
    assert call["name"] == "Paint"


def run_instructor(url: str, tokenizer: str) -> None:
    import instructor
    import openai

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none"), mode=mode)
        settings: Any = {"model": "lora", "messages": QUESTION, "max_tokens": 100}
        made = client.chat.completions.create(response_model=Paint, max_retries=0, **settings)
        assert isinstance(made, Paint)


def run_lm_eval(url: str, tokenizer: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    settings: Any = {"tokenizer_backend": "huggingface", "tokenizer": tokenizer, "max_length": 256}
    lm = LocalCompletionsAPI(base_url=f"{url}/completions", model="lora", **settings)
    request = Instance("loglikelihood", {}, ("the sky is", " blue"), 0)
    assert lm.loglikelihood([request], disable_tqdm=True)[0][0] < 0


if __name__ == "__main__":
    try:
        globals()[f"run_{sys.argv[1]}"](*sys.argv[2:])
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed", file=sys.stderr)
        sys.exit(77)
