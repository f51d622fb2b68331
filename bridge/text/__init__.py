"""Text: a checkpoint's tokenizer and chat template, and ids that become text one at a time.

In: texts, messages and ids. Out: ids and texts. Knows nothing of models and of decoding.
"""
