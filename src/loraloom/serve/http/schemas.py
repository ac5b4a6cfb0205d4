"""Bodies of requests: tools and formats are those of `openai.types`, all else is here."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

from openai.types import chat, shared_params
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from loraloom.config.fields import StrictModel

Tool = chat.ChatCompletionFunctionToolParam
_Path = Annotated[str, StringConstraints(min_length=1, max_length=4096)]  # as in Linux
_StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_TokenKey = Annotated[int, Field(ge=0, lt=2**31, strict=False)]  # JSON's keys are texts
_Name = Annotated[str, StringConstraints(min_length=1, max_length=300)]
_NumTop = Annotated[int, Field(ge=0, le=20)]
_Item = TypeVar("_Item")
# For models within a body, which BodyParser leaves as they are.
_List = Annotated[list[_Item], Field(fail_fast=True)]
# More take the validator, which nothing interrupts, longer than others should wait.
MAX_MESSAGES = 2**15


class SamplingBody(StrictModel):
    """Fields of both kinds of completion; "5" is no number, and "yes" no boolean."""

    model_config = ConfigDict(strict=True)

    model: _Name
    """Base model, adapter, `name:0.5` (half its strength), expert (`auto/law`), or sum."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """Draw from the N most likely tokens; 0 for all."""
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed gives the same text, except for rounding in 16 bits."""
    stop: _StopText | Annotated[list[_StopText], Field(max_length=64)] | None = None
    """End the completion before any of up to 64 texts of up to 1,000 characters."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: dict[_TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1000
    )
    stream: bool = False
    """Send the answer in parts, as server-sent events."""
    stream_options: chat.ChatCompletionStreamOptionsParam | None = None
    ignore_eos: bool = False
    """Generate past the end of the answer, up to max_tokens."""
    routing: bool = False
    """Return the experts of each token; for mixtures."""
    user: str | None = None
    """Accepted and ignored, as are metadata, store and parallel_tool_calls."""
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _leave_out_null(cls, body: Any, check: Callable[[Any], Any]) -> Any:
        if isinstance(body, dict):  # clients send it for what isn't set, whatever its name
            body = {name: value for name, value in body.items() if value is not None}
        return check(body)

    @model_validator(mode="after")
    def _check_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream: true")
        return self


class ChatMessage(BaseModel):
    """A turn of a conversation; what clients add to answers is ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | _List[chat.ChatCompletionContentPartTextParam] | None = None
    name: str | None = None
    tool_calls: _List[chat.ChatCompletionMessageFunctionToolCallParam] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None

    def as_turn(self) -> dict[str, Any]:
        turn, content = self.model_dump(exclude_none=True), self.content or ""
        if not isinstance(content, str):
            content = "".join(piece["text"] for piece in content)
        for call in turn.get("tool_calls", ()):
            with suppress(ValueError, RecursionError):  # templates write arguments as JSON again
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return {**turn, "content": content}


class ChatBody(SamplingBody):
    """A conversation to answer."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    """The turns, at most 32,768."""
    max_tokens: int | None = Field(None, ge=1)
    """Generate at most N tokens. Default: as many as fit."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """Another name for max_tokens."""
    logprobs: bool = False
    top_logprobs: _NumTop | None = None
    response_format: (
        shared_params.ResponseFormatText
        | shared_params.ResponseFormatJSONObject
        | shared_params.ResponseFormatJSONSchema
        | None
    ) = None
    tools: list[Tool] | None = Field(None, min_length=1)
    """Functions for the chat template to render."""
    tool_choice: (
        Literal["none", "auto", "required"] | chat.ChatCompletionNamedToolChoiceParam | None
    ) = None
    """`none` leaves tools out; `required` or a named function constrains the answer to a call."""
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_options(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs: true")
        if self.tool_choice not in (None, "none") and not self.callable_tools:
            raise ValueError("tool_choice requires tools that include the named tool")
        if self.must_call and self.schema_of_answer is not None:
            raise ValueError("response_format must be text if tool_choice requires a call")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ValueError("max_tokens and max_completion_tokens exclude each other")
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools whose calls are looked for in the answer."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        if not isinstance(self.tool_choice, dict):
            return tools
        name = self.tool_choice["function"]["name"]
        return [tool for tool in tools if tool["function"]["name"] == name]

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, dict)

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        match self.response_format:
            case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
                return schema
            case {"type": "json_schema" | "json_object"}:
                return {"type": "object"}
        return None


class CompletionBody(SamplingBody):
    """Prompts to continue."""

    prompt: str | _List[str] | _List[_TokenId] | _List[_List[_TokenId]] = Field(min_length=1)
    """Strings or token IDs."""
    max_tokens: int = Field(16, ge=0)
    """Generate at most N tokens per completion; 0, with `echo`, scores the prompt alone."""
    logprobs: _NumTop | None = None
    """Return log-probabilities, also of the N most likely tokens."""
    echo: bool = False
    """Return the prompt too, with its log-probabilities if `logprobs` is set."""

    @model_validator(mode="after")
    def _check_options(self):
        if self.echo and self.stream:
            raise ValueError("echo and stream exclude each other")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or echo true")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt  # ty: ignore[invalid-explicit-return]


class LoadBody(StrictModel):
    """An adapter to load."""

    lora_name: _Name
    lora_path: _Path
    """Directory on the server, below its --adapter-root if set, or else also a Hub ID."""
    load_inplace: bool = False
    """Replace a loaded adapter of the same name."""


class UnloadBody(StrictModel):
    """An adapter to unload."""

    lora_name: _Name
    lora_int_id: int | None = None  # accepted and ignored
