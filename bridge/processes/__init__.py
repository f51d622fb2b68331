"""Processes of our own, for code that may hang, die or print as it likes.

In: a handler by its name, and requests as bytes. Out: answers as bytes, or how the process was
lost. What the bytes mean is up to the two at the ends:

    ours                                        a fresh interpreter, the head of its own group

    tasks.scorer    a response              ->  a score     tasks.scorer_process
    tasks.gym       a split and a number    ->  a problem   tasks.gym_process
    text.chat       a template, messages    ->  a text      text.chat_process
          |                                                       ^
    parent.Child    line: a socket, one message each way    child.main
                    life: a pipe; once it is closed, by whatever end of ours, all there is killed

`parent` starts one, asks it and ends it; `child` is all that runs there besides the handler; `line`
is what both say. A module named `_process` is a handler's, which nothing of ours imports.
"""
