"""How good a model's groups are at a task, with error bars: metrics, intervals, runs, plots."""
