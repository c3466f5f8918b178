"""Every gRPC option and every deadline. Nothing else names one.

Keepalive sees a stopped process or a cut cable within 3.0 s, but only together with
`grpc.http2.ping_timeout_ms`: without it pings have a timer of 60 s of their own. A pause of 1.4 s
is survived (measured with grpcio 1.85.1).
"""

from __future__ import annotations

MESSAGE_BYTES = 4 * 1024 * 1024
# What a step needs besides its activation: prefill is cut at MESSAGE_BYTES less this.
ENVELOPE_BYTES = 64 * 1024
# Logits of one step, f32: 341 picks from a vocabulary of 49,152, or 130 from LLaMA 3's 128,256.
LOGITS_BYTES = 64 * 1024 * 1024

CONNECT_SECONDS = 3.0
REGISTER_SECONDS = 5.0
CALL_SECONDS = 5.0  # Describe, Status, Tokenize and other small calls
TEXT_LETTERS_PER_SECOND = 100_000  # that the slowest machine cuts into tokens; a laptop 2,000,000
HEARTBEAT_SECONDS = 0.5  # interval
HEARTBEAT_DEADLINE_SECONDS = 2.0
LOST_SECONDS = 4.0  # without a heartbeat
LOAD_STALL_SECONDS = 30.0  # a load without progress
LOAD_NEWS_SECONDS = 5.0  # at most between two messages of a load that goes on
CANCEL_SECONDS = 2.0
DRAIN_SECONDS = 30.0
# Bytes of a message of Fetch. Four streams over one connection on two shared cores, sha256 and
# writing included: 650 MB/s with 256 KiB, 650 with 512 KiB, 730 with 1 MiB, 660 with 2 MiB, and
# larger ones hold more memory. Frame size, windows and more connections gained nothing.
PART_BYTES = 512 * 1024
FETCH_STREAMS = 4  # of one load at a time; one alone brings 80 % of four on loopback
SERVED_STREAMS = 64  # of Fetch and Manifest that one process serves at a time; more are put off
FIND_SECONDS = 5.0
FETCH_STALL_SECONDS = 30.0  # without FETCH_LEAST_BYTES more of a tensor: another source
FETCH_LEAST_BYTES = 64 * 1024
FETCH_AWAY_SECONDS = 60.0  # without a byte from any source: the load is refused
# Pauses before a source that did not answer is asked again; the last one repeats.
FETCH_PAUSES_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
ECHO_BYTES = 1024 * 1024  # most that is echoed
ECHO_SECONDS = 5.0  # of a link's measurement, all exchanges with one other worker
MEASURE_LINKS_SECONDS = 30.0  # of all measurements before a plan
ACK_SECONDS = 10.0  # a step that the next stage does not acknowledge
STEP_FLOOR_SECONDS = 60.0  # without any result, while steps are inside
# An engine's counter without a change, once a step is overdue. It rises at each phase; the longest
# one of 65B with 126 rows, 45 GMAC, takes 4 s on a machine of 12 GMAC/s, and more if it throttles.
STILL_SECONDS = 30.0
IDLE_MESSAGE_SECONDS = 15.0  # without any message of an answer; the coordinator speaks every 5 s
WRITE_SECONDS = 30.0  # a message that a person's program does not take
PUBLIC_RPCS = 256  # calls at a time, besides the answers that run or wait
WORKER_RPCS = 64

DEFAULT_GRPC_PORT = 7685
DEFAULT_FLEET_PORT = 7684
DEFAULT_WORKER_PORT = 7690

Options = list[tuple[str, int]]


def text_seconds(n_letters: int) -> float:
    """Deadline of Tokenize for a text of that length; a book of a million letters: 15 s."""
    return CALL_SECONDS + n_letters / TEXT_LETTERS_PER_SECOND


_BOTH: Options = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
]


def client_options() -> Options:
    """Options of every channel: watched while idle, quick to redial, retries left to us."""
    return [
        *_BOTH,
        ("grpc.keepalive_time_ms", 1500),
        ("grpc.keepalive_timeout_ms", 1500),
        ("grpc.http2.ping_timeout_ms", 1500),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def bulk_options() -> Options:
    """Options of the channels that weights come over.

    Pings are slow: on a line of 10 Mbit/s an answer waits behind seconds of data, which say
    themselves that the other side is there. Who is silent is given up by FETCH_STALL_SECONDS.
    """
    slow = {
        "grpc.keepalive_time_ms": 10_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.http2.ping_timeout_ms": 10_000,
    }
    return [(name, slow.get(name, value)) for name, value in client_options()]


def server_options() -> Options:
    """Options of every server: one owner a port, pings every second allowed.

    Callers are pinged too, slowly: one whose machine fell asleep or lost its cable never hangs up,
    and its call would stay for ever. Who pings us notices much sooner.
    """
    return [
        *_BOTH,
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
    ]
