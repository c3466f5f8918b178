"""The coordinator program: takes requests, decides, holds no weights.

Nothing outside tests imports it.
"""
