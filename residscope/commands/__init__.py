"""Commands of `residscope` that stand for themselves."""
