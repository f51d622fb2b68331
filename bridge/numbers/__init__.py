"""Numbers: what users may give, how floats are rounded, what this machine holds.

In: values of any kind, arrays, sizes in bytes. Out: plain Python numbers and arrays of the wanted
dtype; or one line that refuses them by name.
"""
