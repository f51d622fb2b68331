"""Files: opened with distrust, read strictly, written whole or not at all.

In: paths, of a user or a checkpoint, and what is to be written. Out: text, JSON objects, lines,
settings, values held against types; or one line that names file, field and mend. Knows nothing of
models.
"""
