"""The older name of `bridge.decoding.inputs`, by which backends of others import it."""

from bridge.decoding.inputs import *  # noqa: F403
