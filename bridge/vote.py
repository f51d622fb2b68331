"""The older name of votes: `bridge.evaluation.voting`, and of what they read of a response."""

from bridge.answers.conclusion import extract_answer, normalise
from bridge.answers.places import last_boxed
from bridge.evaluation.voting import Vote, majority, together

__all__ = ["Vote", "extract_answer", "last_boxed", "majority", "normalise", "together"]
