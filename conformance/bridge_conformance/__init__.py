"""Checks of a backend against the spec, by clause."""
