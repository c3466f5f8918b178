"""The worker program: holds the layers of a span and passes activations on.

Nothing outside tests imports it.
"""
