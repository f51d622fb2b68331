"""What responses answer. In: texts. Out: the answer in one, the number or the choice that it is.

`places` finds it, `trimming` takes off what is around it, `numbers` and `choices` read it, and
`conclusion` does all of this: what votes count. Imports nothing else of Bridge, so that votes
(`bridge.evaluation.voting`) and tasks (`bridge.tasks`) read the same answer in the same response.
Whether one is right is a task's matter.
"""
