"""What responses answer: where an answer stands, how it is trimmed, and the number that it is.

Works on texts alone and imports nothing of Bridge, so that votes (`bridge.evaluation.voting`) and
tasks (`bridge.tasks`) read the same answer in the same response. Whether one is right is a task's
matter.
"""
