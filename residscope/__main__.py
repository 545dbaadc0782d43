"""`python -m residscope`: the command `residscope`, where its script is not on PATH. Tested in test_shadowing.py."""

from residscope.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
