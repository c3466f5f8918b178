"""gRPC's knobs, once: options, deadlines, errors to status codes. Stubs are in potluck.rpc.v1."""

PROTOCOL = 1
"""Version of the messages; neighbours N and N-1 work together."""
