"""`python -m residscope`: the command `residscope`, where its script is not on PATH."""

from residscope.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
