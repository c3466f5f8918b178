"""Generated stubs of protocol v1 (scripts/genproto). Only this file is written by hand."""
