"""Numbers: what users may give, how floats are rounded, when rewards are equal, what memory holds.

In: values of any kind, arrays, sizes in bytes. Out: plain Python numbers and arrays of the wanted
dtype; or one line that refuses them by name. Knows neither files nor models.
"""
