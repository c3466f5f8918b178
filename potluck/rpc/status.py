"""The one table between errors, gRPC status codes and exit codes. Doors look it up and add nothing.

The remedy of an error travels as the second line of the status details.
"""

from __future__ import annotations

import grpc

from potluck import errors
from potluck.rpc.v1 import types_pb2

_TABLE: list[tuple[type[errors.PotluckError], grpc.StatusCode]] = [
    # The first match counts: children stand before their parents.
    (errors.PastEnd, grpc.StatusCode.OUT_OF_RANGE),
    (errors.UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UnknownModel, grpc.StatusCode.NOT_FOUND),
    (errors.ContextExceeded, grpc.StatusCode.OUT_OF_RANGE),
    (errors.Full, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.UnknownSession, grpc.StatusCode.NOT_FOUND),
    (errors.UnknownWorker, grpc.StatusCode.NOT_FOUND),
    (errors.WorkerExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.DamagedTensor, grpc.StatusCode.DATA_LOSS),
    (errors.ModelError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PlanError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.SessionError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.StepError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.FrameError, grpc.StatusCode.DATA_LOSS),
    (errors.Cancelled, grpc.StatusCode.CANCELLED),
    (errors.StageLost, grpc.StatusCode.UNAVAILABLE),
    (errors.Unreachable, grpc.StatusCode.UNAVAILABLE),
    (errors.EngineError, grpc.StatusCode.FAILED_PRECONDITION),
]


def code_of(error: errors.PotluckError) -> grpc.StatusCode:
    """The gRPC status code that stands for `error`; INTERNAL if it is in no row of the table."""
    for kind, code in _TABLE:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def details_of(error: errors.PotluckError) -> str:
    """Status details: the message, and the remedy as a second line if there is one."""
    return f"{error.message}\n{error.remedy}" if error.remedy else error.message


def error_of(code: grpc.StatusCode, details: str, address: str) -> errors.PotluckError:
    """The error a caller raises for a failed call to `address`; undoes code_of, for people."""
    message, _, remedy = details.partition("\n")
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return errors.UsageError(message, remedy=remedy)
        case grpc.StatusCode.OUT_OF_RANGE:
            return errors.ContextExceeded(message, remedy=remedy)
        case grpc.StatusCode.NOT_FOUND:
            return errors.UnknownModel(message, remedy=remedy)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.Full(message, remedy=remedy)
        case grpc.StatusCode.CANCELLED:
            return errors.Cancelled(message, remedy=remedy)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.Unreachable(f"{address} did not answer in time", remedy=remedy)
        case grpc.StatusCode.UNAVAILABLE:
            return errors.Unreachable(f"{address}: {message}", remedy=remedy)
        case _:
            return errors.PotluckError(message or code.name, remedy=remedy)


_FAILURES: list[tuple[type[errors.PotluckError], types_pb2.FailureCode.ValueType]] = [
    # Failures inside a step. The first match counts, as above.
    (errors.UnknownSession, types_pb2.FAILURE_CODE_UNKNOWN_SESSION),
    (errors.Full, types_pb2.FAILURE_CODE_FULL),
    (errors.SessionError, types_pb2.FAILURE_CODE_POSITION),
    (errors.FrameError, types_pb2.FAILURE_CODE_BAD_FRAME),
    (errors.FrameError, types_pb2.FAILURE_CODE_NOT_FINITE),
    (errors.StepError, types_pb2.FAILURE_CODE_GAP),
    (errors.StepError, types_pb2.FAILURE_CODE_NOT_LOADED),
    (errors.StageLost, types_pb2.FAILURE_CODE_LINK_LOST),
    (errors.Unreachable, types_pb2.FAILURE_CODE_LINK_LOST),
    (errors.Cancelled, types_pb2.FAILURE_CODE_CANCELLED),
    (errors.UsageError, types_pb2.FAILURE_CODE_INVALID),
]


def failure_code_of(error: errors.PotluckError) -> types_pb2.FailureCode.ValueType:
    """The code that stands for `error` in a step's failures; INTERNAL if no row matches."""
    for kind, code in _FAILURES:
        if isinstance(error, kind):
            return code
    return types_pb2.FAILURE_CODE_INTERNAL


def error_of_failure(failure: types_pb2.Failure) -> errors.PotluckError:
    """The error that a failed session ends with; it names the worker that says so."""
    message = f"worker {failure.worker}: {failure.message}"
    for kind, code in _FAILURES:
        if code == failure.code:
            return kind(message)
    return errors.PotluckError(message)
