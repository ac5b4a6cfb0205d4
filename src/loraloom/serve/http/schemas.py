"""What requests may say. Answers are OpenAI's own types, `openai.types`."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from loraloom.config.fields import StrictModel
from loraloom.errors import shown

_Text = Annotated[str, StringConstraints(min_length=1)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=300)]
_NumTop = Annotated[int, Field(ge=0, le=20)]


class StreamOptions(StrictModel):
    """What a stream has besides text."""

    include_usage: bool = False
    """Send a last piece with the numbers of tokens."""


class SamplingBody(StrictModel):
    """What both kinds of completion take."""

    model: _Name
    """An adapter's name, or the base model's; `name:0.5` is an adapter at half its strength."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """Draw from this many of the most likely tokens; 0 for all."""
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed gives the same text."""
    stop: _Text | list[_Text] | None = Field(None, max_length=1000)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1000
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """End tokens end nothing."""
    routing: bool = False
    """Tell which experts read each token of the answer; for models with routers."""
    user: str | None = None
    """Not read."""
    metadata: dict[str, str] | None = None
    """Not read."""
    store: bool | None = None
    """Not read: nothing is stored."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, body: Any) -> Any:
        # clients send null for what isn't set; that of max_tokens alone has a meaning: all the room
        if not isinstance(body, dict):
            return body
        known = cls.model_fields.keys() - {"max_tokens"}
        return {
            name: value for name, value in body.items() if value is not None or name not in known
        }

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class Turned(BaseModel):
    """A part of a conversation, in which clients may leave what they add to answers."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class FunctionCall(Turned):
    """A call that an assistant made."""

    name: _Name
    arguments: str = ""


class ToolCall(Turned):
    """A call of a tool."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(Turned):
    """A part of a message; only texts are understood."""

    type: Literal["text"]
    text: str


class ChatMessage(Turned):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None

    def as_turn(self) -> dict[str, Any]:
        """The turn as chat templates read it."""
        turn = self.model_dump(exclude_none=True)
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        for call in turn.get("tool_calls", ()):
            with suppress(ValueError, RecursionError):  # templates write arguments as JSON again
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return {**turn, "content": content}


class FunctionDefinition(StrictModel):
    """A function that a model may call."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A tool that a model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class JsonSchema(StrictModel):
    """A schema that the answer keeps to."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and must be there then")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer keeps to; None for any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class ChatBody(SamplingBody):
    """A conversation to continue."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    """Most tokens of the answer; by default as many as there is room for."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """Another name for max_tokens."""
    logprobs: bool = False
    top_logprobs: _NumTop | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, min_length=1)
    """Given to the chat template."""
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    """`none` leaves the tools out; `required` makes the answer a call of one of them, and a named
    function is called, both with arguments of the function's schema."""
    parallel_tool_calls: bool | None = None
    """Not read."""

    @model_validator(mode="after")
    def _check_options(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        names = [tool.function.name for tool in self.tools or ()]
        if self.named_tool not in (None, *names):
            raise ValueError(
                f"tool_choice must name one of the tools {names}, got {shown(self.named_tool)}"
            )
        has_form = self.response_format is not None and self.response_format.type != "text"
        if has_form and (self.named_tool or self.tool_choice == "required"):
            raise ValueError(
                "response_format and a tool_choice that must be called exclude each other"
            )
        return self

    @property
    def named_tool(self) -> str | None:
        """The tool that must be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, Tool) else None

    @property
    def callable_names(self) -> list[str]:
        """Names of the tools whose calls are looked for in the answer."""
        if self.tool_choice == "none" or self.named_tool:
            return []
        return [tool.function.name for tool in self.tools or ()]


class CompletionBody(SamplingBody):
    """Texts to continue."""

    prompt: str | list[str] | list[_TokenId] | list[list[_TokenId]]
    """Texts, or token ids."""
    max_tokens: int | None = Field(16, ge=0)
    """Most tokens of each completion; 0 only together with echo."""
    logprobs: _NumTop | None = None
    """Log-probabilities of tokens, and of this many of the most likely ones."""
    echo: bool = False
    """Put the prompt in front of the completion, with its log-probabilities if they are wanted."""
    suffix: None = None
    best_of: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_options(self):
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of must be n, {self.n}, or be left out, got {self.best_of}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 without echo, got 0")
        if self.max_tokens == 0 and self.routing:
            raise ValueError("routing needs max_tokens of at least 1, got 0")
        if self.echo and self.stream:
            raise ValueError("echo and stream exclude each other")
        if not self.prompt or any(prompt in ("", []) for prompt in self.prompts):
            raise ValueError("prompt must not be empty")
        return self

    @property
    def is_scored(self) -> bool:
        """Whether the prompts' own tokens are told with log-probabilities."""
        return self.echo and self.logprobs is not None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class LoadBody(StrictModel):
    """An adapter to load."""

    lora_name: _Name
    lora_path: _Text
    load_inplace: bool = False
    """It may take the place of one of the same name."""


class UnloadBody(StrictModel):
    """An adapter to let go."""

    lora_name: _Name
    lora_int_id: int | None = None
    """Not read."""
