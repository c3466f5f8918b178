"""Everything that can go wrong, as a tree. Imports nothing.

PotluckError
├── UsageError            a value out of range, options that exclude each other
│   └── PastEnd           an offset beyond the end of what is asked for
├── ModelError            file, shape, type: what was found, what was expected
│   ├── UnknownModel      no such name or path
│   ├── DamagedPack       a pack file changed after it was written; survived inside: made again
│   ├── DamagedTensor     a delivered tensor is not the one that was asked for, or not here any more
│   └── BeingWritten      another process is writing this file; wait for its result
├── PlanError             the workers can't hold it: needed and offered bytes, what to do
├── SessionError          a step that does not fit its session: skips positions
│   ├── UnknownSession    never opened, or closed
│   ├── ContextExceeded   prompt and answer are longer than the context; both numbers
│   └── Full              no room left: queue, sessions, KV pages; try again later
├── StepError             step numbers skipped or an epoch that is not loaded
├── FrameError            an activation: wrong checksum, shape or type, or not finite
├── Cancelled             by the person, or by a flush
├── WorkerError           a worker's identity in the fleet
│   ├── UnknownWorker     not registered (any more); it must register again
│   └── WorkerExists      another living process uses this id
├── Unreachable           nobody answers at an address; what was dialled
├── StageLost             a worker is gone; survived inside, seen only when no plan is left
└── EngineError           the compiled engine is missing, or an ISA this CPU lacks was forced

Raise where the fact is known, with its numbers. Only doors translate, by the one table in
potluck/rpc/status.py.
"""


class PotluckError(Exception):
    """Root of the tree. `remedy` is the second line that people read: what to do."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UsageError(PotluckError):
    """A value out of range, or options that exclude each other. Names the field and its range."""


class PastEnd(UsageError):
    """An offset beyond the end of what is asked for; both numbers are in the message."""


class ModelError(PotluckError):
    """A model file is not what it should be: names file, tensor or offset, found and expected."""


class UnknownModel(ModelError):
    """No model of that name, and no file at that path."""


class DamagedPack(ModelError):
    """A pack file is not what was written. It is to be made again, and the step to be repeated."""


class DamagedTensor(ModelError):
    """A delivered tensor has another sha256 than was asked for, or is gone. It is to be fetched."""


class BeingWritten(ModelError):
    """Another process is writing this file. It is to be waited for."""


class PlanError(PotluckError):
    """The model can't be placed on the workers: bytes needed and offered, and what would help."""


class SessionError(PotluckError):
    """A step does not fit its session."""


class UnknownSession(SessionError):
    """The session was never opened here, or is closed."""


class ContextExceeded(SessionError):
    """Prompt and answer together are longer than the context. Both numbers are in the message."""


class Full(SessionError):
    """No room left (queue, sessions, KV pages). Trying again later may help."""


class StepError(PotluckError):
    """Step numbers were skipped, or the epoch is not the one that is loaded."""


class FrameError(PotluckError):
    """An activation with a wrong checksum, shape or type, or with a value that is not finite."""


class Cancelled(PotluckError):
    """Work was given up on request."""


class WorkerError(PotluckError):
    """A worker's identity in the fleet."""


class UnknownWorker(WorkerError):
    """No such worker is registered (any more): it must register again."""


class WorkerExists(WorkerError):
    """Another living process uses this worker id."""


class Unreachable(PotluckError):
    """Nobody answers at an address."""


class StageLost(PotluckError):
    """A worker is gone. `worker` is its id."""

    def __init__(self, message: str, *, worker: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.worker = worker


class EngineError(PotluckError):
    """The compiled engine is missing, or an ISA that this CPU lacks was forced."""
