"""Processes of our own, for code that may hang, die or print as it likes.

In: a handler by its name, and requests as bytes. Out: answers as bytes, or how the process was
lost. What the bytes mean is up to the two at the ends:

    ours                            a fresh interpreter, the head of a group of its own

    tasks.scorer                    tasks.scorer_process    a response           -> a score
    tasks.gym                       tasks.gym_process       a split and a number -> a problem
    text.chat                       text.chat_process       a template, messages -> a text
    evaluation.peers.worker         ...peers.engine_process a call              -> seconds, tokens
                                    ...peers.limit_process  a device            -> its rates
        | ask(request) -> answer        ^ handler(request) -> answer
    parent.Child  <==== line ====>  child.main
                  ----- life ---->  closed by whatever end of ours, and the whole group is killed

`parent` starts one, asks it and ends it; `child` is all that runs there besides the handler; what
both say on the line is in `line`. A module named `_process` holds a handler: it is named to a
`Child`, and imported there alone.
"""
