"""The same model through Bridge and through other engines, on one machine, in turn.

In: a checkpoint with blocks. Out: tokens a second and the time to the first token, by engine and
width, beside what the machine's memory and arithmetic allow. Each engine runs in a process of its
own (`engine_process`), which sleeps while another measures:

    measure.run            starts the processes of a `plan`, asks them in turn, takes medians
        | worker                   what is asked -> seconds, as JSON
    engine_process.serve   loads one engine, and answers
        | load, decode
    bridge_engine, transformers_engine, llama_cpp, ctranslate2_engine, mlx_lm_engine, vllm_engine

`engine` is what an engine is, and all that a new one must implement; `plan` lists those there are.
A peer gets the host without blocks, which it cannot run, as files in `host.HostFiles`.
"""
