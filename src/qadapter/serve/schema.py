"""What is asked and answered over HTTP, in OpenAI's shapes; /openapi.json follows from it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import PydanticUseDefault, core_schema

from qadapter.strength import MOST, NAME


def _encodable(text: str) -> str:
    """Return the text; JSON can spell halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("Half a surrogate pair is no character") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Strength = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=2**20)]
Prompt = (
    Text
    | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=64)]
    | TokenIds
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=64)]
)
"""Every list ends at its first error, of which one is told: a body may hold a million."""


class _OrNull:
    """Lets a field be null, which is its default."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._given, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "null"}]}

    @staticmethod
    def _given(value: Any) -> Any:
        if value is None:
            raise PydanticUseDefault
        return value


Switch = Annotated[bool, _OrNull()]
Zero = Annotated[float, Field(ge=0, le=0)]


class _Asked(BaseModel):
    """A body with a field that is not known is refused: it would be ignored silently otherwise."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: Any) -> Any:
        """Keep the first field that is not known, which is told, and no more of them."""
        if not isinstance(data, dict):
            return data
        unknown = [name for name in data if name not in cls.model_fields]
        return {k: v for k, v in data.items() if k in cls.model_fields or k == unknown[0]}


class StreamOptions(_Asked):
    """What a stream holds besides the answer."""

    include_usage: Switch = Field(False, description="End with a chunk that counts the tokens.")


class _Generation(_Asked):
    model: Text | None = Field(
        None,
        max_length=1024,
        description="A name that /v1/models lists, or several with + between them, whose residuals "
        "add; default the first of the list.",
    )
    max_tokens: Tokens | None = Field(None, description="Tokens that an answer may have.")
    n: Annotated[int, Field(ge=1, le=16), _OrNull()] = Field(
        1, description="Answers to each prompt."
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**63 - 1,
        description="Same seed, same draws; answer i takes seed + i.",
    )
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=16)] | None = Field(
        None, description="An answer ends before the first of these."
    )
    stream: Switch = Field(
        False, description="Send the answer as server-sent events, as it is made."
    )
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2), _OrNull()] = Field(
        1.0, description="Below 1e-5 is greedy."
    )
    top_p: Annotated[float, Field(ge=0, le=1), _OrNull()] = Field(
        1.0, description="Draw from the likeliest of this mass."
    )
    presence_penalty: Zero | None = Field(None, description="There is none; only 0 is taken.")
    frequency_penalty: Zero | None = Field(None, description="There is none; only 0 is taken.")
    user: Text | None = Field(None, max_length=1024, description="Accepted and not used.")
    strength: (
        Strength
        | Annotated[list[Strength], Field(fail_fast=True, min_length=1, max_length=16)]
        | Annotated[dict[Text, Strength], Field(fail_fast=True, min_length=1, max_length=16)]
        | None
    ) = Field(
        None,
        description="How far the adapters move the base: 0 the base (at the temperature "
        "alpha_tilde / alpha_0, mostly 1), 1 what was trained. One "
        "number, one for each adapter of the model in its order, or numbers by the adapters' "
        "names, whose residuals then add; default the server's.",
    )


class TextPart(_Asked):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(_Asked):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="To templates that know no developer it is the system."
    )
    content: (
        Text
        | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=4096)]
        | None
    ) = Field(description="null, which only an assistant's may be, is empty.")
    name: Text | None = Field(None, max_length=1024, description="Handed to the chat template.")

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("only an assistant's content may be null")
        return self


class TextFormat(_Asked):
    """The only format of answers that there is."""

    type: Literal["text"]


class ChatRequest(_Generation):
    """A conversation that is to go on."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_completion_tokens: Tokens | None = Field(
        None, description="The newer name of max_tokens; default as much as the server allows."
    )
    logprobs: Switch = Field(False, description="Tell each token's log-prob under the policy.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="And the likeliest tokens; needs logprobs."
    )
    response_format: TextFormat | None = None


class CompletionRequest(_Generation):
    """Text that is to go on."""

    prompt: Prompt = Field(description="A text, several, or one or several lists of tokens.")
    max_tokens: Tokens | None = Field(16, description="Tokens that an answer may have.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Tell each token's log-prob, and so many of the likeliest."
    )
    echo: Literal[False] | None = Field(None, description="Prompts are not repeated.")
    best_of: Annotated[int, Field(ge=1, le=1)] | None = Field(
        None, description="All answers that are made are told; only 1 is taken."
    )


class LoadRequest(_Asked):
    """An adapter that is to be served from now on."""

    lora_name: Annotated[str, Field(pattern=rf"^{NAME.pattern}$")] = Field(
        description="Its name to clients, which no other adapter may have."
    )
    lora_path: Text = Field(
        min_length=1, max_length=1024, description="Its directory, in the one that was allowed."
    )


class UnloadRequest(_Asked):
    """An adapter that was loaded and is to go; answers that were begun with it are finished."""

    lora_name: Text = Field(min_length=1, max_length=1024)


class Usage(BaseModel):
    """Tokens of a request; those that end an answer count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Finish = Literal["stop", "length"]


class TopLogprob(BaseModel):
    """A token that could have come."""

    token: str
    logprob: float = Field(description="Nats, before temperature and top_p.")
    bytes: list[int] | None = Field(description="Of the token's text, in UTF-8.")


class ChatLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of an answer, or of a chunk of it."""

    content: list[ChatLogprob]


class AnswerMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish


class _Reply(BaseModel):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str


class ChatCompletion(_Reply):
    """A conversation's answers."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds; the first one tells the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """What a chunk adds to one of `n` answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(_Reply):
    """A server-sent event of a conversation's answers."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """The tokens of an answer, or of a chunk of it."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="Characters of the answer before each token.")


class CompletionChoice(BaseModel):
    """One of `n` answers to one prompt, or a chunk of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None


class Completion(_Reply):
    """A text's continuations, or a server-sent event of them."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A policy that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qadapter"
    max_model_len: int = Field(description="Tokens of prompt and answer together.")


class Unloaded(BaseModel):
    """An adapter that is served no longer."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class Models(BaseModel):
    """The policies that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok"] = "ok"


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


def error(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error's body."""
    return Error(error=ErrorBody(message=message, type=kind, param=param, code=code)).model_dump()
