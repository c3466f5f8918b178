"""What people ask a coordinator, and what it tells them: the nouns. Frozen, so they can be kept.

No wire and no IO: potluck/rpc/messages.py makes them from messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from potluck.plan import DiskFigures, LayerTimes


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How an answer is made. Zero and None switch a value off, as in inference.proto.

    The coordinator checks the ranges (potluck/sampling.py); the client then raises UsageError.
    """

    model: str = ""  # empty: the one that is served
    max_tokens: int = 0  # 0: as many as the context has room for
    temperature: float | None = None  # None: the service's default; 0: greedy
    top_k: int | None = None  # None: the service's default; 0: all tokens
    top_p: float | None = None  # None: the service's default; 1: all tokens
    min_p: float | None = None  # None: the service's default; 0: all tokens
    repetition_penalty: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: a random one, which Done names
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # None: none; n: of each token and of the n most likely
    ignore_end: bool = False
    prompt_logprobs: int | None = None  # None: none; n: of the prompt's tokens, as logprobs
    prompt_logprobs_start: int = 0  # the first position that they are wanted of; 0: as 1


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """ln of a token's probability, of the raw logits: before penalties and filters."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer; `logprob` and `top` (most likely first) if they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new in an answer. Whole characters only: a token's text may come a piece later."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The next tokens of the prompt with their log-probabilities, if they were asked for.

    All of them together are the prompt from `prompt_logprobs_start` on, without its first token.
    """

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Prefill:
    """The prompt is being read (`queue` 0), or waits at place `queue`."""

    done_tokens: int
    total_tokens: int
    queue: int


class FinishReason(StrEnum):
    """Why an answer ended: the model's end token or a stop text; max_tokens or the context."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer. Prefill is from the first step to the first token, decode the rest."""

    finish_reason: FinishReason
    prompt_tokens: int
    answer_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    seed: int

    @property
    def tokens_per_second(self) -> float:
        """Speed of decode: tokens after the first over `decode_seconds`; 0 if there was one."""
        return (self.answer_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of prefill; 0 if it took no measurable time."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0


AnswerEvent = Piece | PromptTokens | Prefill | Done


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is served; `context_tokens` is the service's, the model's may be longer."""

    name: str
    architecture: str
    n_layers: int
    context_tokens: int
    size_bytes: int
    header_sha256: str
    vocab: int
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage of the plan; seconds are medians over the newest decode steps."""

    stage: int  # from 0, in pipeline order
    worker: str
    span: tuple[int, int]  # layers [start, stop)
    memory_bytes: int  # shard and KV budget
    shard_bytes: int
    compute_seconds: float
    serialise_seconds: float
    wire_seconds: float
    wait_seconds: float
    predicted_seconds: float = 0.0  # of `compute_seconds`, by the planner; 0: unknown


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker as its newest heartbeat says; `state` is one of SERVING's words."""

    id: str
    address: str
    state: str
    isa: str
    threads: int
    memory_bytes: int
    memory_free_bytes: int
    resident_bytes: int
    seen_seconds: float
    read_bytes_per_second: float
    load_done_bytes: int
    load_total_bytes: int
    machine: str
    offered_bytes: int = 0  # that a shard and KV may take, when it held none
    room_bytes: int | None = None  # of that, memory, if its weights are mapped from its disk
    layer_times: LayerTimes | None = None  # None: not measured
    disk: DiskFigures | None = None
    load_bytes_per_second: float = 0.0  # fetched or packed, over the newest seconds
    load_seconds_left: float = 0.0  # 0: unknown
    fetched_bytes: int = 0  # of the newest load, from other machines
    fetch_total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LinkReport:
    """One link; `start` and `end` are worker ids, or "coordinator"."""

    start: str
    end: str
    rtt_seconds: float
    bytes_per_second: float
    sent_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class MeasuredLinkReport:
    """A link as it was measured before the plan; ends as in LinkReport."""

    start: str
    end: str
    rtt_seconds: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class ForecastReport:
    """What the planner expects of the plan that is served."""

    tokens_per_second: float  # one session
    total_tokens_per_second: float  # as many sessions as stages
    most_tokens_per_second: float  # twice as many
    first_token_seconds: float  # of a prompt of 512 tokens
    load_seconds: float
    advice: tuple[str, ...] = ()  # one line each
    spares: tuple[str, ...] = ()  # workers that hold nothing


@dataclass(frozen=True, slots=True)
class FiguresReport:
    """Live figures; counts since start, tokens/s over the newest 10 s and all sessions."""

    answer_tokens: int = 0
    prompt_tokens: int = 0
    tokens_per_second: float = 0.0
    steps: int = 0
    coordinator_sent_bytes: int = 0
    coordinator_received_bytes: int = 0
    coordinator_activation_bytes: int = 0  # stays 0: activations go from worker to worker


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """A service now. `state`: waiting, loading, serving or unserved; `detail`: one line."""

    model: str
    state: str
    detail: str
    epoch: int
    plan: tuple[StageReport, ...]
    workers: tuple[WorkerReport, ...]
    links: tuple[LinkReport, ...]
    sessions: int
    queue: int
    potluck_version: str
    protocol: int
    context_tokens: int
    expected_workers: int
    kv_type: str  # f16 or q8
    wire: str  # f32, f16 or q8
    kv_bytes_per_token: int  # of one position of one session, all layers
    figures: FiguresReport = field(default_factory=FiguresReport)
    forecast: ForecastReport | None = None  # None: nothing is planned
    measured_links: tuple[MeasuredLinkReport, ...] = ()

    @property
    def is_serving(self) -> bool:
        """Whether it answers requests now."""
        return self.state == "serving"
